"""What the tests of the v2 protocol share: a server in a thread, its models, tritonclient's four clients
behind one face.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpc_client
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as http_client
import tritonclient.http.aio as http_aio
import uvloop

from trine.server.application import Server, ServerSettings
from trine.server.backends.base import Device, ModelFiles, Respond
from trine.server.errors import ServerError
from trine.server.repository import Repository, RepositorySettings
from trine.server.request import InferRequest, InferResponse
from trine.server.tensors import NUMPY_TYPES, Tensor

CONFIG_TYPES = {name: "TYPE_STRING" if name == "BYTES" else f"TYPE_{name}" for name in NUMPY_TYPES}


class ProbeBackend:
    """Models made for these tests; the parameter `kind` says which."""

    name = "probe"

    def __init__(self) -> None:
        self.cancelled: list[str] = []

    def complete(self, config: Any, files: ModelFiles) -> None:
        """Configurations are complete."""

    def load(self, config: Any, files: ModelFiles) -> ProbeModel:
        return ProbeModel(config, self)


class ProbeModel:
    def __init__(self, config: Any, backend: ProbeBackend) -> None:
        self.kind = config.parameters["kind"].string_value
        self.backend = backend

    def instance(self, device: Device, index: int) -> ProbeModel:
        self.totals: dict[Any, int] = {}
        return self

    def execute_requests(self, requests: list[InferRequest], respond: Respond) -> None:
        for request in requests:
            getattr(self, self.kind)(request, respond)

    def repeat(self, request: InferRequest, respond: Respond) -> None:
        """IN responses, DELAY milliseconds apart; -1: an error after the first."""
        count = int(request.inputs["IN"].array.reshape(-1)[0])
        delay = request.inputs["DELAY"].array.reshape(-1)[0] / 1000 if "DELAY" in request.inputs else 0
        for index in range(abs(count)):
            if delay:
                time.sleep(delay)
            if request.cancelled:
                self.backend.cancelled.append(request.id)
                break
            output = Tensor.of("OUT", np.array([index], np.int32))
            respond(request, InferResponse([output], final=False))
        if count < 0:
            respond(request, InferResponse(error=ServerError("the model gave up")))
        else:
            respond(request, InferResponse(final=True))

    def accumulate(self, request: InferRequest, respond: Respond) -> None:
        """The sum of the sequence so far."""
        value = int(request.inputs["INPUT"].array.reshape(-1)[0])
        before = 0 if request.sequence_start else self.totals.get(request.sequence_id, 0)
        self.totals[request.sequence_id] = before + value
        respond(request, InferResponse([Tensor.of("OUTPUT", np.array([[before + value]], np.int32))]))

    def parameters(self, request: InferRequest, respond: Respond) -> None:
        """The request's parameters as JSON; it answers with parameters of its own."""
        text = json.dumps(dict(request.parameters), sort_keys=True)
        echo: dict[str, Any] = {"number": 7, "text": "seven", "flag": True, "share": 0.5}
        respond(request, InferResponse([Tensor.of("OUT", np.array([text]))], parameters=echo))

    def text(self, request: InferRequest, respond: Respond) -> None:
        """The text in capitals, `times` times as responses of their own."""
        text = request.inputs["text_input"].array.reshape(-1)[0].decode()
        for _ in range(int(request.parameters.get("times", 1))):
            respond(request, InferResponse([Tensor.of("text_output", np.array([[text.upper()]]))], final=False))
        respond(request, InferResponse(final=True))

    def failing(self, request: InferRequest, respond: Respond) -> None:
        raise ValueError("a mistake of the model")

    def close(self) -> None:
        """Nothing is held."""


def tensor_text(kind: str, tensors: Sequence[tuple[str, str, Sequence[int]]], extra: str = "") -> str:
    return "".join(
        f'{kind} [ {{ name: "{name}" data_type: {CONFIG_TYPES[datatype]} dims: {list(dims)} {extra} }} ]\n'
        for name, datatype, dims in tensors
    )


def write_model(root: Path, name: str, config: str, *, versions: Sequence[str] = ("1",)) -> Path:
    for version in versions:
        (root / name / version).mkdir(parents=True, exist_ok=True)
    (root / name / "config.pbtxt").write_text(config)
    return root / name


def probe(kind: str) -> str:
    return f'backend: "probe"\nparameters {{ key: "kind" value {{ string_value: "{kind}" }} }}\n'


def write_add_sub(path: Path, *, factor: int = 1) -> None:
    """OUTPUT0 = INPUT0 + INPUT1, OUTPUT1 = factor · (INPUT0 − INPUT1), of int32 [b, 16]."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.INT32, ["b", 16])

    nodes = [
        helper.make_node("Add", ["INPUT0", "INPUT1"], ["OUTPUT0"]),
        helper.make_node("Sub", ["INPUT0", "INPUT1"], ["difference"]),
        helper.make_node("Mul", ["difference", "factor"], ["OUTPUT1"]),
    ]
    graph = helper.make_graph(
        nodes,
        "add_sub",
        [value("INPUT0"), value("INPUT1")],
        [value("OUTPUT0"), value("OUTPUT1")],
        [numpy_helper.from_array(np.array([factor], np.int32), "factor")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))


def write_repository(root: Path) -> None:
    """Every model that the tests use."""
    simple = write_model(
        root,
        "simple",
        'backend: "onnxruntime"\nmax_batch_size: 8\ndynamic_batching { }\n'
        + tensor_text("input", [("INPUT0", "INT32", [16]), ("INPUT1", "INT32", [16])])
        + tensor_text("output", [("OUTPUT0", "INT32", [16])], 'label_filename: "labels.txt"')
        + tensor_text("output", [("OUTPUT1", "INT32", [16])]),
    )
    write_add_sub(simple / "1" / "model.onnx")
    (simple / "labels.txt").write_text("".join(f"class{index}\n" for index in range(16)))
    for datatype in NUMPY_TYPES:
        write_model(
            root,
            f"identity_{datatype.lower()}",
            'backend: "identity"\n'
            + tensor_text("input", [("INPUT0", datatype, [-1])])
            + tensor_text("output", [("OUTPUT0", datatype, [-1])]),
        )
    write_model(
        root,
        "identity_2d",
        'backend: "identity"\nmax_batch_size: 4\n'
        + tensor_text("input", [("INPUT0", "FP32", [-1, 2])])
        + tensor_text("output", [("OUTPUT0", "FP32", [-1, 2])]),
    )
    write_model(
        root,
        "slow",
        'backend: "identity"\nmax_batch_size: 1\n'
        'parameters { key: "execute_delay_ms" value { string_value: "150" } }\n'
        "instance_group [ { count: 1 kind: KIND_CPU } ]\n"
        + "dynamic_batching { default_queue_policy { max_queue_size: 2 allow_timeout_override: true } }\n"
        + tensor_text("input", [("INPUT0", "FP32", [1])])
        + tensor_text("output", [("OUTPUT0", "FP32", [1])]),
    )
    decoupled = "model_transaction_policy { decoupled: true }\n"
    write_model(
        root,
        "repeat",
        probe("repeat")
        + decoupled
        + tensor_text("input", [("IN", "INT32", [1])])
        + tensor_text("input", [("DELAY", "INT32", [1])], "optional: true")
        + tensor_text("output", [("OUT", "INT32", [1])]),
    )
    write_model(
        root,
        "accumulate",
        probe("accumulate")
        + "max_batch_size: 2\nsequence_batching { max_sequence_idle_microseconds: 5000000 direct { } }\n"
        + tensor_text("input", [("INPUT", "INT32", [1])])
        + tensor_text("output", [("OUTPUT", "INT32", [1])]),
    )
    write_model(
        root,
        "parameters",
        probe("parameters")
        + tensor_text("input", [("IN", "INT32", [1])])
        + tensor_text("output", [("OUT", "BYTES", [1])]),
    )
    write_model(
        root,
        "text",
        probe("text")
        + decoupled
        + "max_batch_size: 4\n"
        + tensor_text("input", [("text_input", "BYTES", [1])])
        + tensor_text("output", [("text_output", "BYTES", [1])]),
    )
    write_model(
        root,
        "failing",
        probe("failing")
        + tensor_text("input", [("IN", "INT32", [1])])
        + tensor_text("output", [("OUT", "INT32", [1])]),
    )


class RunningServer:
    """A server in a thread of its own."""

    def __init__(self, repository: RepositorySettings, settings: ServerSettings) -> None:
        ports = dict.fromkeys(("http_port", "grpc_port", "metrics_port"), 0)
        self.settings = replace(settings, **ports)  # type: ignore[arg-type]
        self.probe = ProbeBackend()
        self._repository_settings = repository
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait(60)
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve())
        except BaseException as error:
            self._failure = error
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        self.repository = Repository(self._repository_settings)
        self.repository.add_backend(self.probe)
        server = Server(self.repository, self.settings)
        await server.start()
        self.ports = server.ports
        self.server = server
        self._ready.set()
        await self._end.wait()
        await server.close()

    @property
    def http(self) -> str:
        return f"127.0.0.1:{self.ports['http']}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.ports['grpc']}"

    @property
    def metrics(self) -> str:
        return f"127.0.0.1:{self.ports['metrics']}"

    def in_loop(self, function: Callable[[], Any]) -> Any:
        """Run a function in the server's thread."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(30)
        assert not self._thread.is_alive()


KINDS = ("http", "http.aio", "grpc", "grpc.aio")
_MODULES: dict[str, Any] = {"http": http_client, "http.aio": http_client, "grpc": grpc_client, "grpc.aio": grpc_client}


class Client:
    """One of tritonclient's clients. Methods that are not here are the client's own; coroutines are awaited."""

    def __init__(self, kind: str, server: RunningServer, **options: Any) -> None:
        self.kind = kind
        self.is_http = kind.startswith("http")
        self.module = _MODULES[kind]
        url = server.http if self.is_http else server.grpc
        self._loop = asyncio.new_event_loop() if kind.endswith("aio") else None
        if kind == "http.aio":
            self.raw: Any = self._await(self._make(http_aio.InferenceServerClient, url, **options))
        elif kind == "grpc.aio":
            self.raw = self._await(self._make(grpc_aio.InferenceServerClient, url, **options))
        else:
            self.raw = self.module.InferenceServerClient(url, **options)

    @staticmethod
    async def _make(kind: Any, url: str, **options: Any) -> Any:
        return kind(url, **options)

    def _await(self, value: Any) -> Any:
        if self._loop is not None and asyncio.iscoroutine(value):
            return self._loop.run_until_complete(value)
        return value

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        return self._await(getattr(self.raw, name)(*arguments, **options))

    def described(self, name: str, *arguments: Any, **options: Any) -> Any:
        """The answer as plain values, whichever protocol it came by."""
        if not self.is_http:
            options["as_json"] = True
        return self.call(name, *arguments, **options)

    def input(self, name: str, array: np.ndarray[Any, Any], datatype: str, *, binary: bool = True) -> Any:
        tensor = self.module.InferInput(name, list(array.shape), datatype)
        if self.is_http:
            tensor.set_data_from_numpy(array, binary_data=binary)
        else:
            tensor.set_data_from_numpy(array)
        return tensor

    def output(self, name: str, *, binary: bool = True, class_count: int = 0) -> Any:
        if self.is_http:
            return http_client.InferRequestedOutput(name, binary_data=binary, class_count=class_count)
        return grpc_client.InferRequestedOutput(name, class_count=class_count)

    def infer(self, model: str, inputs: Sequence[Any], **options: Any) -> Any:
        return self.call("infer", model, list(inputs), **options)

    def add_sub(self, first: np.ndarray[Any, Any], second: np.ndarray[Any, Any], **options: Any) -> Any:
        tensors = [self.input("INPUT0", first, "INT32"), self.input("INPUT1", second, "INT32")]
        return self.infer("simple", tensors, **options)

    def close(self) -> None:
        self._await(self.raw.close())
        if self._loop is not None:
            self._loop.close()
