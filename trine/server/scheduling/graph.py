"""The graph of an ensemble: which step needs which tensors, checked against the members when the ensemble is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from trine.core.errors import ConfigurationError
from trine.server.proto import pb
from trine.server.validation import dims_text

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


@dataclass(frozen=True, slots=True)
class _End:
    """What one side of a tensor says of it; `full_dims` has the batch dimension too."""

    model: str
    data_type: int
    dims: tuple[int, ...]
    full_dims: tuple[int, ...]

    @classmethod
    def of(cls, config: ModelConfig, tensor: Any) -> _End:
        dims = tuple(tensor.dims)
        return cls(config.name, tensor.data_type, dims, (-1, *dims) if config.max_batch_size else dims)


def _match(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return len(one) == len(other) and all(
        -1 in (first, second) or first == second for first, second in zip(one, other, strict=True)
    )


class Graph:
    """Steps in an order in which they can run, and who makes each tensor."""

    def __init__(self, config: ModelConfig, member_config: Callable[[str, str], ModelConfig]) -> None:
        self.name: str = config.name
        self.config = config
        self.inputs = {tensor.name: tensor for tensor in config.input}
        self.outputs = {tensor.name: tensor for tensor in config.output}
        self.makers: dict[str, Step] = {}
        steps = [self._step(index, step, member_config) for index, step in enumerate(config.ensemble_scheduling.step)]
        self._check_tensors(steps)
        self.steps = self._ordered(steps)
        self._find_streams()
        self.decoupled = any(step.decoupled for step in steps)
        batches = config.max_batch_size > 0
        self.adapted = {name for name, step in self.makers.items() if (step.config.max_batch_size > 0) != batches}
        """Tensors of members that have a batch dimension where the ensemble has none, or the other way round."""
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
        self._check_batch_size(made)
        self._check_names(made, "input", made.inputs, {tensor.name for tensor in config.input})
        self._check_names(made, "output", made.outputs, {tensor.name for tensor in config.output})
        for tensor in config.input:
            if not tensor.optional and tensor.name not in made.inputs:
                raise ConfigurationError(
                    f"in ensemble {self.name}, input {tensor.name} in model {made.model} is not mapped to any ensemble "
                    "tensors: add it to input_map"
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
        for name, tensor in mapped.items():
            if name not in known:
                way = "mapping to" if kind == "input" else "mapped from"
                raise ConfigurationError(
                    f"in ensemble {self.name}, ensemble tensor {tensor} is {way} non-existing {kind} {name} in model "
                    f"{step.model}, which has {', '.join(sorted(known))}"
                )

    def _check_tensors(self, steps: list[Step]) -> None:
        """Every tensor is made and used, and both ends agree on its type and shape."""
        ends: dict[str, _End] = {name: _End.of(self.config, tensor) for name, tensor in self.inputs.items()}
        for step in steps:
            by_name = {tensor.name: tensor for tensor in step.config.output}
            for output, name in step.outputs.items():
                ends[name] = _End.of(step.config, by_name[output])
        used = set(self.outputs)
        for step in steps:
            by_name = {tensor.name: tensor for tensor in step.config.input}
            for name, source in step.inputs.items():
                used.add(source)
                if source not in ends:
                    raise ConfigurationError(
                        f"in ensemble {self.name}, ensemble tensor '{source}' is not mapped as output in any step: no "
                        f"step makes it, but input '{name}' of model '{step.model}' needs it"
                    )
                self._agree(source, ends[source], _End.of(step.config, by_name[name]))
        for name, tensor in self.outputs.items():
            if name not in self.makers:
                raise ConfigurationError(
                    f"in ensemble {self.name}, no step makes its output '{name}': ensemble tensor '{name}' is unwritten"
                )
            self._agree(name, ends[name], _End.of(self.config, tensor))
        for name in ends:
            if name not in used:
                raise ConfigurationError(
                    f"ensemble tensor '{name}' is unused in ensemble '{self.name}': no step takes it, and it is no "
                    "output"
                )

    def _agree(self, name: str, made: _End, taken: _End) -> None:
        where = f"in ensemble {self.name}, ensemble tensor {name}: inconsistent"
        if made.data_type != taken.data_type:
            types = [pb.DataType.Name(end.data_type) for end in (made, taken)]
            raise ConfigurationError(
                f"{where} data type: {types[0]} is inferred from model {made.model} while {types[1]} is inferred from "
                f"model {taken.model}"
            )
        if not _match(made.dims, taken.dims) and not _match(made.full_dims, taken.full_dims):
            raise ConfigurationError(
                f"{where} shape: {dims_text(made.full_dims)} is inferred from model {made.model} while "
                f"{dims_text(taken.full_dims)} is inferred from model {taken.model}"
            )

    def _check_batch_size(self, step: Step) -> None:
        limit, allowed = step.config.max_batch_size, self.config.max_batch_size
        if limit and limit < allowed:  # one that does not batch itself takes a batch as a shape
            raise ConfigurationError(
                f"ensemble {self.name} allows maximum batch size {allowed}, but it contains model {step.model} which "
                f"only allows maximum batch size to be {limit}"
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
        for step in self.steps:
            step.stream = self._last_source(step.ancestors, step.model)
        behind = {index for name in self.outputs for index in (self.makers[name].index, *self.makers[name].ancestors)}
        self._last_source(behind, self.name)

    def _last_source(self, indices: Collection[int], model: str) -> Step | None:
        """The decoupled step among these that all others among them lie before."""
        sources = [step for step in self.steps if step.index in indices and step.decoupled]
        last = max(sources, key=lambda source: len(source.ancestors), default=None)
        for source in sources:
            if last is not None and source is not last and source.index not in last.ancestors:
                raise ConfigurationError(
                    f"in ensemble {self.name}, step of model '{model}' receives inputs originated from different "
                    f"decoupled models: responses of '{source.model}' and '{last.model}' can't be matched"
                )
        return last
