"""A repository in this process, and what tests say to it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from trine.server.backends.base import Device, ModelFiles, Respond
from trine.server.errors import ServerError
from trine.server.repository import Repository, RepositorySettings
from trine.server.request import InferRequest, InferResponse, RequestedOutput
from trine.server.tensors import Array, Tensor


def write_model(root: Path, name: str, config: str, *versions: str) -> Path:
    """A model's folder with a configuration and empty version directories."""
    folder = root / name
    for version in versions or ("1",):
        (folder / version).mkdir(parents=True, exist_ok=True)
    (folder / "config.pbtxt").write_text(config)
    return folder


def identity(root: Path, name: str = "identity", *versions: str, extra: str = "", datatype: str = "TYPE_FP32") -> Path:
    """FP32[4] in, the same out, batches of up to 8."""
    return write_model(
        root,
        name,
        f"""backend: "identity" max_batch_size: 8
        input [{{ name: "IN" data_type: {datatype} dims: [4] }}]
        output [{{ name: "OUT" data_type: {datatype} dims: [4] }}] {extra}""",
        *versions,
    )


def slow(root: Path, name: str, extra: str, *, max_batch_size: int = 8) -> Path:
    """A model of the back end `testing`: takes `delay_ms` for an execution."""
    return write_model(
        root,
        name,
        f"""backend: "testing" max_batch_size: {max_batch_size}
        input [{{ name: "IN" data_type: TYPE_FP32 dims: [1] }}]
        output [{{ name: "OUT" data_type: TYPE_FP32 dims: [1] }}] {extra}""",
    )


def scaling_model(factor: float, *, batch: bool = True, constant: bool = False) -> bytes:
    """ONNX: y = x · factor, x is FP32[n, 4]."""
    shape: list[Any] = ["n", 4] if batch else [4]
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        "scale",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.float32(factor), "factor")],
    )
    return model_bytes(graph)


def model_bytes(graph: Any) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def scaling(root: Path, name: str, factors: dict[str, float], config: str = "") -> Path:
    """An ONNX model whose versions scale by different factors."""
    folder = write_model(root, name, config, *factors)
    for version, factor in factors.items():
        (folder / version / "model.onnx").write_bytes(scaling_model(factor))
    return folder


class SleepingBackend:
    """Back end `testing`: OUT = IN after `delay_ms`; remembers its batches; fails or streams where it is told to."""

    name = "testing"

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[float]]] = []
        self.concurrent = 0
        self.most_concurrent = 0

    def complete(self, config: Any, files: ModelFiles) -> None:
        """Configurations are whole."""

    def load(self, config: Any, files: ModelFiles) -> SleepingModel:
        return SleepingModel(self, config)


class SleepingModel:
    def __init__(self, backend: SleepingBackend, config: Any) -> None:
        self.backend = backend
        self.config = config

    def instance(self, device: Device, index: int) -> SleepingInstance:
        return SleepingInstance(self.backend, self.config, index)

    def close(self) -> None:
        """Nothing is held."""


class SleepingInstance:
    def __init__(self, backend: SleepingBackend, config: Any, index: int) -> None:
        self._backend = backend
        self._name: str = config.name
        self._index = index
        parameters = {key: value.string_value for key, value in config.parameters.items()}
        self._delay = float(parameters.get("delay_ms", 0)) / 1000
        self._fails = "fails" in parameters
        self._stream = config.model_transaction_policy.decoupled
        self._repeat = int(parameters.get("repeat", 0))

    def execute_requests(self, requests: list[InferRequest], respond: Respond) -> None:
        backend = self._backend
        values = [float(next(iter(request.inputs.values())).array.reshape(-1)[0]) for request in requests]
        backend.batches.append((f"{self._name}:{self._index}", values))
        backend.concurrent += 1
        backend.most_concurrent = max(backend.most_concurrent, backend.concurrent)
        delay = self._delay * values[0] if self._repeat < 0 else self._delay
        time.sleep(delay)
        backend.concurrent -= 1
        if self._fails:
            raise ServerError("told to fail")
        for request in requests:
            tensor = next(iter(request.inputs.values()))
            if not self._stream:
                respond(request, InferResponse([tensor.renamed("OUT")]))
                continue
            for step in range(int(tensor.array.reshape(-1)[0])):
                value = np.full(tensor.shape, step, np.float32)
                respond(request, InferResponse([Tensor.of("OUT", value)], final=False))
            respond(request, InferResponse())

    def close(self) -> None:
        """Nothing is held."""


@contextlib.asynccontextmanager
async def serving(root: Path, backend: SleepingBackend | None = None, **settings: Any) -> AsyncIterator[Repository]:
    """A repository over `root`, started; closed at the end."""
    repository = Repository(RepositorySettings((str(root),), **settings))
    repository.add_backend(backend or SleepingBackend())
    try:
        await repository.start()
        yield repository
    finally:
        await repository.close(5.0)


def start(repository: Repository, name: str, inputs: dict[str, Array], **options: Any) -> asyncio.Future[Any]:
    """Submit a request; the future has its responses, or its error."""
    future: asyncio.Future[list[InferResponse]] = asyncio.get_running_loop().create_future()
    responses: list[InferResponse] = []

    def respond(response: InferResponse) -> None:
        if response.error is not None:
            if not future.done():
                future.set_exception(response.error)
            return
        responses.append(response)
        if response.final and not future.done():
            future.set_result(responses)

    version = options.get("model_version", "")
    wanted: Sequence[str] | None = options.pop("outputs", None)
    tensors = {key: Tensor.of(key, array) for key, array in inputs.items()}
    outputs = None if wanted is None else [RequestedOutput(output) for output in wanted]
    context = options.pop("context", None)
    request = InferRequest(name, tensors, respond, outputs=outputs, **options)
    request.context = context
    future.request = request  # type: ignore[attr-defined]
    repository.model(name, version).submit(request)
    return future


async def infer(repository: Repository, name: str, inputs: dict[str, Array], **options: Any) -> dict[str, Array]:
    """The outputs of a request that gets one response."""
    responses = await start(repository, name, inputs, **options)
    assert len(responses) == 1
    return {tensor.name: tensor.array for tensor in responses[0].outputs}


def row(*values: float) -> Array:
    """FP32 of one row."""
    return np.array([values], np.float32)
