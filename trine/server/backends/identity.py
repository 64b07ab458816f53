"""identity: outputs are the inputs. For measuring the server itself, and for tests of batching.

The n-th output is the n-th input, whatever their names. Parameters of the configuration:

execute_delay_ms                each execution takes so long
instance_wise_delay_multiplier  the n-th instance's delay is multiplied by n × this
"""

from __future__ import annotations

import time
from typing import Any

from trine.core.errors import ConfigurationError
from trine.server.backends.base import Device, ModelFiles, Respond
from trine.server.request import InferRequest, InferResponse
from trine.server.tensors import Tensor

ModelConfig = Any


class IdentityBackend:
    name = "identity"

    def __init__(self, settings: dict[str, str]) -> None:
        """There is nothing to set."""

    def complete(self, config: ModelConfig, files: ModelFiles) -> None:
        """There is nothing to learn from files."""

    def load(self, config: ModelConfig, files: ModelFiles) -> IdentityModel:
        if len(config.input) < len(config.output):
            raise ConfigurationError(
                f"model '{config.name}': identity needs an input for each output, it has {len(config.input)} inputs "
                f"and {len(config.output)} outputs"
            )
        for source, target in zip(config.input, config.output, strict=False):
            if source.data_type != target.data_type:
                raise ConfigurationError(
                    f"model '{config.name}': input '{source.name}' and output '{target.name}' have different data_type"
                )
        return IdentityModel(config)


class IdentityModel:
    def __init__(self, config: ModelConfig) -> None:
        self._names = [(source.name, target.name) for source, target in zip(config.input, config.output, strict=False)]
        self._delay = _number(config, "execute_delay_ms") / 1000
        self._multiplier = _number(config, "instance_wise_delay_multiplier")

    def instance(self, device: Device, index: int) -> IdentityInstance:
        delay = self._delay * (index * self._multiplier if self._multiplier and index else 1)
        return IdentityInstance(self._names, delay)

    def close(self) -> None:
        """Nothing is held."""


class IdentityInstance:
    """Hands each request's tensors back as they came."""

    def __init__(self, names: list[tuple[str, str]], delay: float) -> None:
        self._names = names
        self._only = names[0] if len(names) == 1 else None
        self._delay = delay
        self.immediate = delay == 0

    def execute_requests(self, requests: list[InferRequest], respond: Respond) -> None:
        if self._delay:
            time.sleep(self._delay)
        for request in requests:
            inputs = request.inputs
            if self._only is not None and self._only[0] in inputs:
                outputs = [inputs[self._only[0]].renamed(self._only[1])]
            else:
                outputs = self._outputs(request)
            respond(request, InferResponse(outputs))

    def _outputs(self, request: InferRequest) -> list[Tensor]:
        wanted = None if request.outputs is None else {output.name for output in request.outputs}
        outputs = []
        for source, target in self._names:
            if wanted is not None and target not in wanted:
                continue
            if source in request.inputs:
                outputs.append(request.inputs[source].renamed(target))
        return outputs

    def close(self) -> None:
        """Nothing is held."""


def _number(config: ModelConfig, key: str) -> float:
    if key not in config.parameters:
        return 0.0
    text = config.parameters[key].string_value
    try:
        return float(text)
    except ValueError:
        raise ConfigurationError(f"model '{config.name}': parameter {key}={text!r} is not a number") from None
