"""model_warmup: requests that every instance computes before its model is ready."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from trine.core.errors import ModelLoadError, TrineError
from trine.server.configuration.types import datatype_name
from trine.server.instances import Batch, Worker
from trine.server.request import InferRequest, InferResponse
from trine.server.tensors import NUMPY_TYPES, Tensor

logger = logging.getLogger("trine.server")

ModelConfig = Any

_ANSWER_SECONDS = 300.0


async def warm_up(config: ModelConfig, directory: Path | None, workers: list[Worker]) -> None:
    """Compute each sample `count` times on each instance. ModelLoadError names the sample that fails."""
    for sample in config.model_warmup:
        inputs = _inputs(config, sample, directory)
        for worker in workers:
            for _ in range(max(1, sample.count)):
                await _compute(config, sample, inputs, worker)


def rehearse(config: ModelConfig, instances: list[Any]) -> None:
    """Compute once on zeros with each instance that takes whole tensors, in a thread that loads.

    The first execution of a framework allocates and tunes; a model that takes a served one's place has that behind it.
    What zeros can't be computed on shows nothing and is no error.
    """
    if config.model_warmup or config.HasField("sequence_batching") or config.batch_input:
        return
    lead = (1,) if config.max_batch_size else ()
    outputs = [tensor.name for tensor in config.output]
    for instance in instances:
        if not hasattr(instance, "execute"):
            continue
        inputs = {}
        for tensor in config.input:
            dims = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
            shape = (*lead, *(1 if dim == -1 else dim for dim in dims))
            if not tensor.optional:
                inputs[tensor.name] = _data(datatype_name(tensor.data_type), shape, random=False)
        try:
            instance.execute(inputs, outputs)
        except Exception as error:
            logger.debug("model %s does not compute on zeros: %s", config.name, error)


def check_samples(config: ModelConfig, directory: Path | None) -> None:
    """Raise ModelLoadError for a sample whose data can't be made."""
    for sample in config.model_warmup:
        _inputs(config, sample, directory)


async def _compute(config: ModelConfig, sample: Any, inputs: dict[str, Tensor], worker: Worker) -> None:
    """One execution: `batch_size` requests of one row each."""
    ended = asyncio.Event()
    errors: list[TrineError] = []
    left = max(1, sample.batch_size)

    def respond(response: InferResponse) -> None:
        nonlocal left
        if response.error is not None:
            errors.append(response.error)
        if response.final:
            left -= 1
            if not left:
                ended.set()

    requests = [InferRequest(config.name, dict(inputs), respond, model_version="") for _ in range(left)]
    batch = Batch(requests, len(requests), "warm-up")
    try:
        await worker.compute_aside(batch, partial(_hand_over, asyncio.get_running_loop()))
        if batch.error is not None:
            errors.append(batch.error)
        elif batch.outputs is None and not errors:
            await asyncio.wait_for(ended.wait(), _ANSWER_SECONDS)
    except TimeoutError:
        errors.append(ModelLoadError(f"no answer within {_ANSWER_SECONDS:g} s"))
    if errors:
        raise ModelLoadError(
            f"model '{config.name}': failed to run warmup sample '{sample.name}' on instance {worker.name}: "
            f"{errors[0].message}"
        )


def _hand_over(loop: asyncio.AbstractEventLoop, request: InferRequest, response: InferResponse) -> None:
    loop.call_soon_threadsafe(request.respond, response)


def _inputs(config: ModelConfig, sample: Any, directory: Path | None) -> dict[str, Tensor]:
    lead = (1,) if config.max_batch_size else ()
    return {
        name: _tensor(
            f"model '{config.name}': warmup sample '{sample.name}', input '{name}'", name, given, lead, directory
        )
        for name, given in sample.inputs.items()
    }


def _tensor(where: str, name: str, given: Any, lead: tuple[int, ...], directory: Path | None) -> Tensor:
    datatype = datatype_name(given.data_type)
    if datatype not in NUMPY_TYPES:
        raise ModelLoadError(f"{where}: set data_type")
    shape = (*lead, *given.dims)
    if any(dim < 1 for dim in shape):
        raise ModelLoadError(f"{where}: dims {list(given.dims)} must all be known, so that there can be data")
    kind = given.WhichOneof("input_data_type")
    if kind == "input_data_file":
        path = (directory or Path()) / "warmup" / given.input_data_file
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ModelLoadError(f"{where}: {path} can't be read: {error}") from error
        expected = prod(shape) * NUMPY_TYPES[datatype].itemsize
        if datatype != "BYTES" and len(raw) != expected:
            raise ModelLoadError(f"{where}: {path} has {len(raw)} bytes, {expected} are needed")
        return Tensor(name, datatype, shape, None, raw)
    if kind is None:
        raise ModelLoadError(f"{where}: give zero_data, random_data or input_data_file")
    return Tensor(name, datatype, shape, _data(datatype, shape, random=kind == "random_data"))


def _data(datatype: str, shape: tuple[int, ...], *, random: bool) -> Any:
    generator = np.random.default_rng(0)
    if datatype == "BYTES":
        array = np.empty(prod(shape), dtype=object)
        array[:] = [generator.bytes(8).hex().encode() if random else b"" for _ in range(prod(shape))]
        return array.reshape(shape)
    dtype = NUMPY_TYPES[datatype]
    if not random:
        return np.zeros(shape, dtype)
    if dtype.kind == "f":
        return generator.random(shape).astype(dtype)
    high = 2 if dtype.kind == "b" else 128
    return generator.integers(0, high, shape).astype(dtype)
