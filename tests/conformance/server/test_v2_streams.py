"""Streams, decoupled models, cancellation and deadlines over gRPC; generate over HTTP."""

from __future__ import annotations

import asyncio
import http.client
import json
import queue
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.grpc.aio as grpc_aio
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from tests.conformance.server.v2 import RunningServer


def repeat_inputs(count: int, delay: int = 0) -> list[Any]:
    tensors = []
    for name, value in (("IN", count), ("DELAY", delay)):
        tensor = grpc_client.InferInput(name, [1], "INT32")
        tensor.set_data_from_numpy(np.array([value], np.int32))
        tensors.append(tensor)
    return tensors


def number(value: float) -> list[Any]:
    tensor = grpc_client.InferInput("INPUT0", [1], "FP32")
    tensor.set_data_from_numpy(np.array([value], np.float32))
    return [tensor]


class Stream:
    """A stream of the synchronous client, its answers in a queue."""

    def __init__(self, server: RunningServer, **options: Any) -> None:
        self.client = grpc_client.InferenceServerClient(server.grpc)
        self.answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.client.start_stream(lambda result, error: self.answers.put((result, error)), **options)

    def get(self) -> tuple[Any, Any]:
        return self.answers.get(timeout=10)


@pytest.fixture
def stream(v2: RunningServer) -> Iterator[Stream]:
    made = Stream(v2)
    yield made
    made.client.stop_stream()
    made.client.close()


def final_flag(result: Any) -> bool:
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


def test_decoupled_responses_and_their_end(stream: Stream) -> None:
    stream.client.async_stream_infer("repeat", repeat_inputs(3), request_id="r", enable_empty_final_response=True)
    results = [stream.get() for _ in range(4)]
    assert [error for _, error in results] == [None] * 4
    assert [int(result.as_numpy("OUT")[0]) for result, _ in results[:3]] == [0, 1, 2]
    assert [final_flag(result) for result, _ in results] == [False, False, False, True]
    assert {result.get_response().id for result, _ in results} == {"r"}
    assert not results[3][0].get_response().outputs
    # Without the wish for it, the empty final response does not come.
    stream.client.async_stream_infer("repeat", repeat_inputs(0), request_id="none")
    stream.client.async_stream_infer("repeat", repeat_inputs(1), request_id="one")
    result, error = stream.get()
    assert error is None
    assert result.get_response().id == "one"


def test_answers_keep_the_order_of_requests(stream: Stream) -> None:
    for index in range(50):
        stream.client.async_stream_infer("identity_fp32", number(index), request_id=str(index))
    assert [stream.get()[0].get_response().id for _ in range(50)] == [str(index) for index in range(50)]


def test_an_error_is_an_answer_and_the_stream_lives_on(stream: Stream) -> None:
    stream.client.async_stream_infer("identity_fp32", number(1), request_id="a")
    stream.client.async_stream_infer("nobody", number(1), request_id="b")
    stream.client.async_stream_infer("repeat", repeat_inputs(-1), request_id="c")
    first, error = stream.get()
    assert (first.get_response().id, error) == ("a", None)
    _, error = stream.get()
    assert "Request for unknown model: 'nobody' is not found" in error.message()
    result, error = stream.get()
    assert int(result.as_numpy("OUT")[0]) == 0
    _, error = stream.get()
    assert "the model gave up" in error.message()
    stream.client.async_stream_infer("identity_fp32", number(2), request_id="d")
    assert stream.get()[0].get_response().id == "d"


def test_real_errors_end_the_stream(v2: RunningServer) -> None:
    stream = Stream(v2, headers={"triton_grpc_error": "true"})
    stream.client.async_stream_infer("nobody", number(1))
    _, error = stream.get()
    assert "NOT_FOUND" in str(error.status())
    stream.client.stop_stream()


def test_asynchronous_stream(v2: RunningServer) -> None:
    async def run() -> list[int]:
        client = grpc_aio.InferenceServerClient(v2.grpc)

        async def requests() -> Any:
            yield {"model_name": "repeat", "inputs": repeat_inputs(4)}

        seen = []
        async for result, error in client.stream_infer(requests()):
            assert error is None
            seen.append(int(result.as_numpy("OUT")[0]))
        await client.close()
        return seen

    assert asyncio.run(run()) == [0, 1, 2, 3]


def test_a_stream_called_off_cancels_its_requests(v2: RunningServer) -> None:
    stream = Stream(v2)
    stream.client.async_stream_infer("repeat", repeat_inputs(200, 20), request_id="called off")
    stream.get()
    stream.client.stop_stream(cancel_requests=True)
    deadline = time.monotonic() + 10
    while "called off" not in v2.probe.cancelled and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "called off" in v2.probe.cancelled


def test_a_call_called_off(v2: RunningServer) -> None:
    client = grpc_client.InferenceServerClient(v2.grpc)
    answers: queue.Queue[Any] = queue.Queue()
    tensor = grpc_client.InferInput("INPUT0", [1, 1], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 1), np.float32))
    call = client.async_infer("slow", [tensor], callback=lambda result, error: answers.put(error))
    call.cancel()
    error = answers.get(timeout=10)
    assert "CANCELLED" in str(error.status())
    client.close()


def test_deadlines(v2: RunningServer) -> None:
    client = grpc_client.InferenceServerClient(v2.grpc)
    tensor = grpc_client.InferInput("INPUT0", [1, 1], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 1), np.float32))
    with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
        client.infer("slow", [tensor], client_timeout=0.02)
    client.close()
    # The server keeps to it by itself: a client that sends a deadline and does not watch it is told.
    with grpc.insecure_channel(v2.grpc) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )
        request = service_pb2.ModelInferRequest(model_name="slow")
        request.inputs.add(name="INPUT0", datatype="FP32", shape=[1, 1])
        request.raw_input_contents.append(bytes(4))
        with pytest.raises(grpc.RpcError) as failure:
            call(request, metadata=[("grpc-timeout", "20m")])
        assert failure.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.fixture
def stub(v2: RunningServer) -> Iterator[Any]:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(v2.grpc, options=options) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def add_sub_request() -> Any:
    request = service_pb2.ModelInferRequest(model_name="simple", id="typed")
    for name in ("INPUT0", "INPUT1"):
        tensor = request.inputs.add(name=name, datatype="INT32", shape=[1, 16])
        tensor.contents.int_contents.extend(range(16))
    return request


def test_typed_contents(stub: Any) -> None:
    answer = stub.ModelInfer(add_sub_request())
    assert answer.id == "typed"
    assert np.frombuffer(answer.raw_output_contents[0], np.int32).tolist() == [2 * value for value in range(16)]
    mixed = add_sub_request()
    mixed.raw_input_contents.append(bytes(64))
    with pytest.raises(grpc.RpcError, match="contents field must not be specified when using raw_input_contents"):
        stub.ModelInfer(mixed)
    wrong = add_sub_request()
    wrong.inputs[0].contents.Clear()
    wrong.inputs[0].contents.fp32_contents.extend([1.0] * 16)
    with pytest.raises(grpc.RpcError) as failure:
        stub.ModelInfer(wrong)
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("datatype", "field", "values"),
    [
        ("BOOL", "bool_contents", [True, False]),
        ("INT8", "int_contents", [-128, 127]),
        ("INT16", "int_contents", [-5, 5]),
        ("INT64", "int64_contents", [-(2**63), 2**63 - 1]),
        ("UINT8", "uint_contents", [0, 255]),
        ("UINT16", "uint_contents", [0, 65535]),
        ("UINT32", "uint_contents", [0, 2**32 - 1]),
        ("UINT64", "uint64_contents", [0, 2**64 - 1]),
        ("FP32", "fp32_contents", [0.5, -1.0]),
        ("FP64", "fp64_contents", [0.1, -1e300]),
        ("BYTES", "bytes_contents", [b"a", b"\xff\x00"]),
    ],
)
def test_every_kind_of_contents(stub: Any, datatype: str, field: str, values: list[Any]) -> None:
    def request(model: str) -> Any:
        made = service_pb2.ModelInferRequest(model_name=model)
        made.inputs.add(name="INPUT0", datatype=datatype, shape=[2])
        return made

    typed = request(f"identity_{datatype.lower()}")
    getattr(typed.inputs[0].contents, field).extend(values)
    answer = stub.ModelInfer(typed)
    again = request(f"identity_{datatype.lower()}")
    again.raw_input_contents.extend(answer.raw_output_contents)
    assert stub.ModelInfer(again).raw_output_contents == answer.raw_output_contents
    if datatype == "BYTES":
        assert answer.raw_output_contents[0] == b"\1\0\0\0a\2\0\0\0\xff\x00"
    else:
        dtype = {"BOOL": "?", "FP32": "<f4", "FP64": "<f8"}.get(datatype)
        dtype = dtype or f"<{'u' if datatype[0] == 'U' else 'i'}{int(datatype.strip('UINT')) // 8}"
        assert np.frombuffer(answer.raw_output_contents[0], dtype).tolist() == values


def test_large_messages(stub: Any) -> None:
    """Larger than every window and frame, both ways."""
    values = np.random.default_rng(0).standard_normal(3_000_000).astype(np.float32)
    request = service_pb2.ModelInferRequest(model_name="identity_fp32")
    request.inputs.add(name="INPUT0", datatype="FP32", shape=[len(values)])
    request.raw_input_contents.append(values.tobytes())
    calls = [stub.ModelInfer.future(request) for _ in range(4)]
    for call in calls:
        assert call.result().raw_output_contents[0] == values.tobytes()


def test_wrong_messages(v2: RunningServer) -> None:
    with grpc.insecure_channel(v2.grpc) as channel:
        for method in ("ModelInfer", "ModelMetadata"):
            call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
            with pytest.raises(grpc.RpcError) as failure:
                call(b"\xff\xff\xff")
            assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as failure:
            channel.unary_unary("/inference.GRPCInferenceService/Nothing")(b"")
        assert failure.value.code() == grpc.StatusCode.UNIMPLEMENTED


def post(v2: RunningServer, path: str, body: Any, **headers: str) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection(v2.http, timeout=20)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, headers)
    response = connection.getresponse()
    answer = response.status, response.getheader("content-type", ""), response.read()
    connection.close()
    return answer


def test_generate(v2: RunningServer) -> None:
    status, kind, body = post(v2, "/v2/models/text/generate", {"text_input": "hello", "id": "x"})
    assert (status, kind) == (200, "application/json")
    assert body == b'{"id":"x","model_name":"text","model_version":"1","text_output":"HELLO"}'
    status, _, body = post(v2, "/v2/models/text/versions/1/generate", {"text_input": ["a"], "parameters": {"times": 1}})
    assert json.loads(body)["text_output"] == "A"
    status, _, body = post(v2, "/v2/models/text/generate", {"text_input": "a", "times": 2})
    assert status == 400
    assert b"generate expects model to produce exactly 1 response, use generate stream" in body
    status, _, body = post(v2, "/v2/models/text/generate", {})
    assert status == 400
    assert b"missing required input(s) ['text_input']" in body
    assert post(v2, "/v2/models/nobody/generate", {})[0] == 404
    for wrong in (
        b"[1]",
        b"{bad",
        b"",
        b'{"text_input": 5}',
        b'{"text_input": {"a": 1}}',
        b'{"text_input":"a","x":[1]}',
    ):
        assert post(v2, "/v2/models/text/generate", wrong)[0] == 400
    status, _, body = post(v2, "/v2/models/text/generate", {"text_input": "a"}, **{"Content-Encoding": "gzip"})
    assert (status, json.loads(body)["error"]) == (400, "Unsupported content-encoding, only 'identity' is supported.")


def test_generate_stream(v2: RunningServer) -> None:
    status, kind, body = post(v2, "/v2/models/text/generate_stream", {"text_input": "hi", "times": 3})
    assert (status, kind) == (200, "text/event-stream; charset=utf-8")
    event = b'data: {"model_name":"text","model_version":"1","text_output":"HI"}\n\n'
    assert body == 3 * event
    status, kind, body = post(v2, "/v2/models/repeat/generate_stream", {"IN": -1})
    assert (status, kind) == (200, "text/event-stream; charset=utf-8")
    assert (
        body == b'data: {"OUT":0,"model_name":"repeat","model_version":"1"}\n\ndata: {"error":"the model gave up"}\n\n'
    )
    status, kind, _ = post(v2, "/v2/models/repeat/generate_stream", {"IN": "x"})
    assert (status, kind) == (400, "application/json")
    assert post(v2, "/v2/models/repeat/generate_stream", {"IN": 0})[2] == b""


def test_an_http_client_that_hangs_up_cancels(v2: RunningServer) -> None:
    connection = http.client.HTTPConnection(v2.http, timeout=20)
    body = json.dumps({"IN": 500, "DELAY": 10, "id": "hung up"})
    connection.request("POST", "/v2/models/repeat/generate_stream", body)
    connection.getresponse().read(10)
    connection.close()
    deadline = time.monotonic() + 10
    while "hung up" not in v2.probe.cancelled and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "hung up" in v2.probe.cancelled
