"""Inputs and outputs as a model's file has them, for back ends of formats that say so: completion and check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trine.core.errors import ConfigurationError, ModelLoadError
from trine.server.configuration.complete import default_max_batch_size
from trine.server.configuration.types import datatype_name, datatype_number
from trine.server.errors import ServerError
from trine.server.tensors import Array

ModelConfig = Any


@dataclass(frozen=True, slots=True)
class FileTensor:
    """An input or output: -1 is a variable dimension; a scalar, or a shape that the file leaves open, is empty.

    `datatype` is the protocol's name, or the file's own where the protocol has none.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def is_batched(self) -> bool:
        """Whether the first dimension is variable, so that it can be the batch."""
        return self.shape[:1] == (-1,)


def complete_tensors(
    config: ModelConfig, inputs: Sequence[FileTensor], outputs: Sequence[FileTensor], settings: Mapping[str, str]
) -> None:
    """Fill inputs, outputs and batching where the configuration leaves them out, in place."""
    batches = all(tensor.is_batched for tensor in (*inputs, *outputs))
    if not config.input and not config.output and config.max_batch_size == 0 and batches:
        config.max_batch_size = default_max_batch_size(settings)
        scheduled = config.HasField("dynamic_batching") or config.HasField("sequence_batching")
        if config.max_batch_size > 1 and not scheduled:
            config.dynamic_batching.SetInParent()
    given = _supplied(config)
    states = {state.output_name for state in config.sequence_batching.state}
    _fill(config, config.input, [tensor for tensor in inputs if tensor.name not in given])
    _fill(config, config.output, [tensor for tensor in outputs if tensor.name not in states])


def is_complete(config: ModelConfig) -> bool:
    """Whether nothing is left that the model file would have to tell."""
    tensors = [*config.input, *config.output]
    return bool(config.input and config.output) and all(tensor.data_type and tensor.dims for tensor in tensors)


def check_tensors(config: ModelConfig, inputs: Sequence[FileTensor], outputs: Sequence[FileTensor]) -> None:
    """That the configuration's tensors are the model's. ConfigurationError names the first that is not."""
    known = {tensor.name: tensor for tensor in inputs}
    for tensor in config.input:
        _check_tensor(config, "input", tensor, known)
    for tensor in config.output:
        _check_tensor(config, "output", tensor, {tensor.name: tensor for tensor in outputs})
    configured = {tensor.name for tensor in config.input} | _supplied(config)
    if missing := sorted(set(known) - configured):
        raise ConfigurationError(
            f"model '{config.name}': the model file has the inputs {missing} that the configuration lacks: "
            f"expected {len(known)} inputs, got {len(config.input)}"
        )


def decoded_text(array: Array) -> Array:
    """The strings of BYTES as `str`, which frameworks take. ServerError: bytes that are no UTF-8 can't be one."""
    flat = array.reshape(-1)
    try:
        decoded = np.array([item.decode() if isinstance(item, bytes) else item for item in flat], dtype=object)
    except UnicodeDecodeError as error:
        raise ServerError(f"a string of the request is not UTF-8: {error}") from error
    return decoded.reshape(array.shape)


def _supplied(config: ModelConfig) -> set[str]:
    """Inputs that the server itself gives: of batches, and of sequences."""
    names = {name for item in config.batch_input for name in item.target_name}
    names |= {control.name for control in config.sequence_batching.control_input}
    return names | {state.input_name for state in config.sequence_batching.state}


def _fill(config: ModelConfig, configured: Any, actual: list[FileTensor]) -> None:
    """Add the tensors that are not configured; give the others the type and dims they lack."""
    by_name = {tensor.name: tensor for tensor in configured}
    if configured and not set(by_name) <= {tensor.name for tensor in actual}:
        return  # names that are wrong are for `check_tensors` to report
    for tensor in actual:
        message = by_name.get(tensor.name)
        if message is None:
            if by_name:
                continue
            message = configured.add(name=tensor.name)
        if not message.data_type:
            message.data_type = datatype_number(tensor.datatype)
        if not message.data_type:
            raise ModelLoadError(f"tensor '{tensor.name}' is {tensor.datatype}, which the protocol can't carry")
        if not message.dims:
            dims = tensor.shape[1:] if config.max_batch_size else tensor.shape
            message.dims.extend(dims or [1])
            if not dims:
                message.reshape.SetInParent()


def _check_tensor(config: ModelConfig, kind: str, tensor: Any, known: Mapping[str, FileTensor]) -> None:
    actual = known.get(tensor.name)
    if actual is None:
        raise ConfigurationError(
            f"model '{config.name}': {kind} '{tensor.name}' is not in the model file, which has {sorted(known)}"
        )
    if datatype_name(tensor.data_type) != actual.datatype:
        raise ConfigurationError(
            f"model '{config.name}': {kind} '{tensor.name}' is {actual.datatype} in the model file, the configuration "
            f"says {datatype_name(tensor.data_type)}"
        )
    if not actual.shape:
        return
    dims = list(tensor.reshape.shape) if tensor.HasField("reshape") else list(tensor.dims)
    scattered = {name for item in config.batch_output for name in item.target_name}
    if config.max_batch_size and not getattr(tensor, "allow_ragged_batch", False) and tensor.name not in scattered:
        dims = [-1, *dims]
        if not actual.is_batched:
            raise ConfigurationError(
                f"model '{config.name}': max_batch_size is {config.max_batch_size}, but the first dimension of {kind} "
                f"'{tensor.name}' in the model file is {actual.shape[0]}: set max_batch_size to 0, or export the model "
                "with a variable batch dimension"
            )
    elif config.max_batch_size:
        return
    have = actual.shape
    if len(have) != len(dims) or any(-1 not in pair and pair[0] != pair[1] for pair in zip(have, dims, strict=True)):
        raise ConfigurationError(
            f"model '{config.name}': {kind} '{tensor.name}' has shape {list(have)} in the model file, the "
            f"configuration says {dims}"
        )
