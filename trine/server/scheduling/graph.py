"""The graph of an ensemble: which step needs which tensors, checked against the members when the ensemble is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from trine.core.errors import ConfigurationError
from trine.server.configuration.types import datatype_name

ModelConfig = Any


@dataclass(slots=True)
class Step:
    """One member's part. inputs: the member's input to the ensemble's tensor; outputs likewise.

    stream: the decoupled step whose every response runs this one anew; None: it runs once a request
    """

    index: int
    model: str
    version: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    config: ModelConfig
    decoupled: bool
    stream: Step | None = None
    ancestors: set[int] = field(default_factory=set)

    def __hash__(self) -> int:
        return self.index


class Graph:
    """Steps in an order in which they can run, and who makes each tensor."""

    def __init__(self, config: ModelConfig, member_config: Callable[[str, str], ModelConfig]) -> None:
        self.name: str = config.name
        self.inputs = {tensor.name: tensor for tensor in config.input}
        self.outputs = {tensor.name: tensor for tensor in config.output}
        self.makers: dict[str, Step] = {}
        steps = [self._step(index, step, member_config) for index, step in enumerate(config.ensemble_scheduling.step)]
        self._check_tensors(steps)
        self.steps = self._ordered(steps)
        self._find_streams()
        self.decoupled = any(step.decoupled for step in steps)
        self._pruned: dict[frozenset[str], list[Step]] = {}

    def needed(self, outputs: Collection[str]) -> list[Step]:
        """The steps without which these outputs of the ensemble can't be made, in order."""
        key = frozenset(outputs)
        if key not in self._pruned:
            indices: set[int] = set()
            for name in key:
                step = self.makers[name]
                indices |= {step.index, *step.ancestors}
            self._pruned[key] = [step for step in self.steps if step.index in indices]
        return self._pruned[key]

    def _step(self, index: int, step: Any, member_config: Callable[[str, str], ModelConfig]) -> Step:
        version = str(step.model_version) if step.model_version > 0 else ""
        config = member_config(step.model_name, version)
        made = Step(
            index,
            step.model_name,
            version,
            dict(step.input_map),
            dict(step.output_map),
            config,
            config.model_transaction_policy.decoupled,
        )
        self._check_names(made, "input", made.inputs, {tensor.name for tensor in config.input})
        self._check_names(made, "output", made.outputs, {tensor.name for tensor in config.output})
        for tensor in config.input:
            if not tensor.optional and tensor.name not in made.inputs:
                raise ConfigurationError(
                    f"in ensemble {self.name}, step of model '{made.model}' lacks input '{tensor.name}': add it to "
                    "input_map"
                )
        for tensor in made.outputs.values():
            if tensor in self.makers or tensor in self.inputs:
                raise ConfigurationError(
                    f"in ensemble {self.name}, ensemble tensor '{tensor}' is written more than once: each tensor has "
                    "one step that makes it, or is an input"
                )
            self.makers[tensor] = made
        return made

    def _check_names(self, step: Step, kind: str, mapped: Mapping[str, str], known: Collection[str]) -> None:
        for name in mapped:
            if name not in known:
                raise ConfigurationError(
                    f"in ensemble {self.name}, step of model '{step.model}' maps {kind} '{name}', which the model does "
                    f"not have: it has {', '.join(sorted(known))}"
                )

    def _check_tensors(self, steps: list[Step]) -> None:
        types: dict[str, tuple[int, str]] = {
            name: (tensor.data_type, f"ensemble input '{name}'") for name, tensor in self.inputs.items()
        }
        for step in steps:
            by_name = {tensor.name: tensor for tensor in step.config.output}
            for output, tensor in step.outputs.items():
                types[tensor] = (by_name[output].data_type, f"output '{output}' of model '{step.model}'")
        used: set[str] = set()
        for step in steps:
            by_name = {tensor.name: tensor for tensor in step.config.input}
            for name, tensor in step.inputs.items():
                used.add(tensor)
                if tensor not in types:
                    raise ConfigurationError(
                        f"in ensemble {self.name}, ensemble tensor '{tensor}' is not mapped as output in any step: no "
                        f"step makes it, but input '{name}' of model '{step.model}' needs it"
                    )
                self._check_type(tensor, types[tensor], by_name[name].data_type, f"input '{name}' of '{step.model}'")
        for name, tensor in self.outputs.items():
            if name not in self.makers:
                raise ConfigurationError(
                    f"in ensemble {self.name}, no step makes its output '{name}': ensemble tensor '{name}' is unwritten"
                )
            self._check_type(name, types[name], tensor.data_type, f"ensemble output '{name}'")
        for name in self.inputs:
            if name not in used:
                raise ConfigurationError(
                    f"in ensemble {self.name}, ensemble tensor '{name}' is unused: no step takes this input"
                )

    def _check_type(self, tensor: str, made: tuple[int, str], wanted: int, by: str) -> None:
        if made[0] != wanted:
            raise ConfigurationError(
                f"in ensemble {self.name}, ensemble tensor '{tensor}': inconsistent data type: "
                f"{datatype_name(made[0])} from {made[1]}, but {datatype_name(wanted)} for {by}"
            )

    def _ordered(self, steps: list[Step]) -> list[Step]:
        """Steps after those whose tensors they need; each gets the indices of all steps before it."""
        ordered: list[Step] = []
        remaining = list(steps)
        while remaining:
            able = [
                step
                for step in remaining
                if all(self.makers[tensor] in ordered for tensor in step.inputs.values() if tensor in self.makers)
            ]
            if not able:
                names = ", ".join(step.model for step in remaining)
                raise ConfigurationError(
                    f"in ensemble {self.name}, circular dependency between the steps of {names}: each waits for a "
                    "tensor of another"
                )
            for step in able:
                for tensor in step.inputs.values():
                    maker = self.makers.get(tensor)
                    if maker is not None:
                        step.ancestors |= {maker.index, *maker.ancestors}
                remaining.remove(step)
                ordered.append(step)
        return ordered

    def _find_streams(self) -> None:
        """For each step, the last decoupled step before it; all others before it must lie before that one."""
        by_index = {step.index: step for step in self.steps}
        for step in self.steps:
            sources = [by_index[index] for index in step.ancestors if by_index[index].decoupled]
            if not sources:
                continue
            last = max(sources, key=lambda source: len(source.ancestors))
            for source in sources:
                if source is not last and source.index not in last.ancestors:
                    raise ConfigurationError(
                        f"in ensemble {self.name}, step of model '{step.model}' needs tensors of two decoupled models, "
                        f"'{source.model}' and '{last.model}', neither of which follows the other: their responses "
                        "can't be matched"
                    )
            step.stream = last
