"""HTTP as curl and raw sockets see it: raw requests, compression, framing, malformed bodies, metrics; and that the
connection's fast path and the ASGI application answer alike.
"""

from __future__ import annotations

import gzip
import http.client
import json
import socket
import zlib
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conformance.server.v2 import RunningServer

NUMBERS = list(range(16))
SIMPLE = {
    "inputs": [
        {"name": "INPUT0", "shape": [1, 16], "datatype": "INT32", "data": NUMBERS},
        {"name": "INPUT1", "shape": [1, 16], "datatype": "INT32", "data": NUMBERS},
    ]
}
INFER = "/v2/models/simple/infer"


def ask(
    v2: RunningServer, method: str, path: str, body: Any = None, *, chunked: bool = False, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """`chunked` takes the way through the ASGI server."""
    connection = http.client.HTTPConnection(v2.http, timeout=20)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if chunked:
        connection.request(method, path, iter([data or b""]), named, encode_chunked=True)
    else:
        connection.request(method, path, data, named)
    response = connection.getresponse()
    answer = response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()
    connection.close()
    return answer


@pytest.mark.parametrize("chunked", [False, True])
def test_an_answer_is_byte_for_byte_what_clients_expect(v2: RunningServer, chunked: bool) -> None:
    status, headers, body = ask(v2, "POST", INFER, {**SIMPLE, "id": "abc"}, chunked=chunked)
    assert status == 200
    assert headers["content-type"] == "application/json"
    assert body == (
        b'{"id":"abc","model_name":"simple","model_version":"1","outputs":[{"name":"OUTPUT0","datatype":"INT32",'
        b'"shape":[1,16],"data":[0,2,4,6,8,10,12,14,16,18,20,22,24,26,28,30]},{"name":"OUTPUT1","datatype":"INT32",'
        b'"shape":[1,16],"data":[0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0]}]}'
    )


@pytest.mark.parametrize("chunked", [False, True])
def test_raw_requests(v2: RunningServer, chunked: bool) -> None:
    values = np.arange(6, dtype=np.float32)
    raw = {"inference_header_content_length": "0"}
    status, headers, body = ask(v2, "POST", "/v2/models/identity_fp32/infer", values.tobytes(), chunked=chunked, **raw)
    assert status == 200
    length = int(headers["inference-header-content-length"])
    described = json.loads(body[:length])["outputs"][0]
    assert described["shape"] == [6]
    assert body[length:] == values.tobytes()
    assert ask(v2, "POST", "/v2/models/identity_fp32/infer", b"12345", chunked=chunked, **raw)[0] == 400
    status, _, body = ask(v2, "POST", INFER, b"1234", chunked=chunked, **raw)
    assert status == 400
    assert b"Raw request must only have 1 input (found 1) to be deduced but got 2 inputs in 'simple'" in body
    status, headers, body = ask(v2, "POST", "/v2/models/identity_2d/infer", bytes(24), chunked=chunked, **raw)
    length = int(headers["inference-header-content-length"])
    assert json.loads(body[:length])["outputs"][0]["shape"] == [1, 3, 2]


@pytest.mark.parametrize(
    ("body", "headers", "text"),
    [
        (b"{bad", {}, "failed to parse the request JSON buffer"),
        (b"", {}, "failed to parse the request JSON buffer"),
        (b"[]", {}, "failed to parse the request JSON buffer"),
        (b"null", {}, "failed to parse"),
        (b"{}", {}, "inputs"),
        (b'{"inputs":5}', {}, "inputs"),
        (b'{"inputs":[5]}', {}, "inputs[0]"),
        (b'{"inputs":[{"shape":[1],"datatype":"INT32","data":[1]}]}', {}, "name"),
        (b'{"inputs":[{"name":"INPUT0","datatype":"INT32","data":[1]}]}', {}, "shape"),
        (b'{"inputs":[{"name":"INPUT0","shape":[1,16],"data":[1]}]}', {}, "datatype"),
        (b'{"inputs":[{"name":"INPUT0","shape":[1,16],"datatype":"INT32"}]}', {}, "But no field is set"),
        (b'{"inputs":[{"name":"INPUT0","shape":[1,-16],"datatype":"INT32","data":[1]}]}', {}, "shape"),
        (b'{"inputs":[{"name":"INPUT0","shape":[9223372036854775807,16],"datatype":"INT32","data":[1]}]}', {}, "Shape"),
        (b'{"inputs":[{"name":"INPUT0","shape":[1,1],"datatype":"INT32","data":["a"]}]}', {}, "an array of INT32"),
        (b'{"inputs":[{"name":"INPUT0","shape":[1,1],"datatype":"INT32","data":[1.5]}]}', {}, "an array of INT32"),
        (b'{"inputs":[{"name":"INPUT0","shape":[1],"datatype":"INT8","data":[300]}]}', {}, "is no INT8"),
        (b'{"inputs":[{"name":"INPUT0","shape":[1],"datatype":"BOGUS","data":[1]}]}', {}, "invalid datatype for input"),
        (b'{"inputs":[{"name":"INPUT0","shape":[1],"datatype":"FP16","data":[1]}]}', {}, "receiving FP16 data"),
        (b'{"id":5,"inputs":[]}', {}, "id"),
        (b'{"parameters":{"triton_x":1},"inputs":[]}', {}, "parameter keys starting with 'triton_' are reserved"),
        (b'{"parameters":{"a":[1]},"inputs":[]}', {}, "parameter 'a' has invalid type."),
        (b'{"parameters":{"priority":-1},"inputs":[]}', {}, "Unable to parse 'priority'"),
        (b'{"parameters":{"sequence_id":1.5},"inputs":[]}', {}, "Unable to parse 'sequence_id'"),
        (b'{"parameters":{"sequence_start":1},"inputs":[]}', {}, "'sequence_start' must be a boolean"),
        (b"[" * 100_000, {}, "failed to parse"),
        (b'{"inputs":[{"name":"N","shape":[1],"datatype":"INT32","data":' + b"[" * 50_000 + b"]" * 9 + b"}]}", {}, ""),
        (b"{}", {"inference_header_content_length": "5"}, "inference header size should be in range (0, 2), got: 5"),
        (b"{}", {"inference_header_content_length": "-1"}, "inference header size should be in range (0, 2), got: -1"),
        (b"{}", {"inference_header_content_length": "x"}, "must be a number"),
        (b"{}", {"content_encoding": "gzip"}, "is not gzip data"),
        (gzip.compress(b"{}", mtime=0)[:-9], {"content_encoding": "gzip"}, "is not gzip data"),
        (b'\xff{"inputs":[]}', {}, "failed to parse"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("chunked", [False, True])
def test_malformed_requests(v2: RunningServer, body: bytes, headers: dict[str, str], text: str, chunked: bool) -> None:
    status, answered, answer = ask(v2, "POST", INFER, body, chunked=chunked, **headers)
    assert status == 400, answer
    assert answered["content-type"] == "application/json"
    assert text in json.loads(answer)["error"]


def test_binary_that_does_not_fit(v2: RunningServer) -> None:
    def binary(size: int, body: bytes) -> tuple[int, str]:
        inputs = [{"name": "INPUT0", "shape": [4], "datatype": "FP32", "parameters": {"binary_data_size": size}}]
        head = json.dumps({"inputs": inputs}).encode()
        length = {"inference_header_content_length": str(len(head))}
        status, _, answer = ask(v2, "POST", "/v2/models/identity_fp32/infer", head + body, **length)
        return status, json.loads(answer).get("error", "")

    assert binary(16, bytes(16))[0] == 200
    assert binary(16, bytes(8)) == (
        400,
        "unexpected size for input 'INPUT0', expecting 8 additional bytes for model 'identity_fp32'",
    )
    assert "unexpected additional input data" in binary(16, bytes(20))[1]
    assert "input byte size mismatch" in binary(12, bytes(12))[1]
    assert binary(-1, b"")[0] == 400


@pytest.mark.parametrize("kind", ["gzip", "deflate"])
@pytest.mark.parametrize("chunked", [False, True])
def test_compression(v2: RunningServer, kind: str, chunked: bool) -> None:
    pack, unpack = (gzip.compress, gzip.decompress) if kind == "gzip" else (zlib.compress, zlib.decompress)
    body = pack(json.dumps(SIMPLE).encode())
    status, headers, answer = ask(v2, "POST", INFER, body, chunked=chunked, content_encoding=kind, accept_encoding=kind)
    assert status == 200
    assert headers["content-encoding"] == kind
    assert json.loads(unpack(answer))["outputs"][0]["data"] == [2 * value for value in NUMBERS]


def test_compression_refused(v2: RunningServer) -> None:
    status, headers, body = ask(v2, "POST", INFER, b"{}", content_encoding="br")
    assert status == 501
    assert headers["accept-encoding"] == "gzip, deflate"
    assert json.loads(body) == {"error": "Unsupported compression type"}
    status, headers, _ = ask(v2, "POST", INFER, SIMPLE, accept_encoding="br")
    assert status == 200
    assert "content-encoding" not in headers


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_above_the_limit(v2: RunningServer, chunked: bool) -> None:
    limit = v2.settings.max_body
    status, _, body = ask(v2, "POST", INFER, bytes(limit + 1), chunked=chunked)
    assert status == 400
    assert b"exceeds the maximum allowed input size" in body
    status, _, body = ask(v2, "POST", INFER, gzip.compress(bytes(limit + 1)), chunked=chunked, content_encoding="gzip")
    assert status == 400
    assert b"exceeds the maximum allowed input size" in body


@pytest.mark.parametrize(
    ("method", "path", "status", "body"),
    [
        ("POST", "/v2/health/live", 405, b'{"error":"Method Not Allowed"}'),
        ("GET", INFER, 405, b'{"error":"Method Not Allowed"}'),
        ("PUT", INFER, 405, b'{"error":"Method Not Allowed"}'),
        ("GET", "/v2/nothing", 404, b'{"error":"Not Found"}'),
        ("GET", "/nothing", 404, b'{"error":"Not Found"}'),
        ("GET", "/v2/models/simple/versions/x", 404, b'{"error":"Not Found"}'),
        ("GET", "/v2/models/nobody/ready", 400, b'{"error":"Model version not ready"}'),
        ("GET", "/v2/health/ready", 200, b""),
        ("POST", "/v2/repository/local/index", 200, None),
    ],
)
def test_routes(v2: RunningServer, method: str, path: str, status: int, body: bytes | None) -> None:
    given, _, answer = ask(v2, method, path)
    assert given == status
    assert body is None or answer == body


def raw_exchange(v2: RunningServer, data: bytes, *, half_close: bool = False) -> bytes:
    host, _, port = v2.http.partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(data)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received


def test_framing(v2: RunningServer) -> None:
    live = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    close = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert raw_exchange(v2, live * 20 + close).count(b"HTTP/1.1 200 OK") == 21
    body = json.dumps(SIMPLE).encode()
    post = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (INFER.encode(), len(body), body)
    answers = raw_exchange(v2, post * 3 + close)
    assert answers.count(b'"model_name":"simple"') == 3
    assert answers.endswith(b"Content-Length: 0\r\n\r\n")
    assert b"200 OK" in raw_exchange(v2, post, half_close=True)
    assert b"200 OK" in raw_exchange(v2, close.replace(b"1.1\r\n", b"1.0\r\n"))
    expect = post.replace(b"Host: x", b"Host: x\r\nExpect: 100-continue\r\nConnection: close")
    assert raw_exchange(v2, expect).startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")


def test_a_request_in_small_pieces(v2: RunningServer) -> None:
    body = json.dumps(SIMPLE).encode()
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (
        INFER.encode(),
        len(body),
    )
    host, _, port = v2.http.partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for index in range(0, len(head + body), 7):
            connection.sendall((head + body)[index : index + 7])
        received = b""
        while part := connection.recv(65536):
            received += part
    assert b'"model_name":"simple"' in received


@pytest.mark.parametrize(
    "data",
    [
        b"GET /v2 HTTP/9.9\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"POST /v2/models/simple/infer HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v2/models/simple/infer HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /v2/models/simple/infer HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET /v2/" + b"x" * 70_000,
    ],
)
def test_what_is_no_http(v2: RunningServer, data: bytes) -> None:
    answer = raw_exchange(v2, data)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431")), answer


def test_metrics(v2: RunningServer) -> None:
    def sample(name: str, **labels: str) -> float:
        connection = http.client.HTTPConnection(v2.metrics, timeout=20)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        families = list(text_string_to_metric_families(text))
        assert len({family.name for family in families}) == len(families)
        for family in families:
            for found in family.samples:
                if found.name in (name, name + "_total") and labels.items() <= found.labels.items():
                    return float(found.value)
        raise AssertionError(name)

    before = sample("nv_inference_request_success", model="simple", version="1")
    refusals = sample("nv_inference_request_failure", model="failing", reason="BACKEND")
    ask(v2, "POST", INFER, SIMPLE)
    failing = {"inputs": [{"name": "IN", "shape": [1], "datatype": "INT32", "data": [1]}]}
    assert ask(v2, "POST", "/v2/models/failing/infer", failing)[0] == 500
    assert sample("nv_inference_request_success", model="simple", version="1") == before + 1
    assert sample("nv_inference_request_failure", model="failing", reason="BACKEND") == refusals + 1
    for reason in ("REJECTED", "CANCELED", "BACKEND", "OTHER"):
        sample("nv_inference_request_failure", model="simple", reason=reason)
    for name in ("nv_inference_count", "nv_inference_exec_count", "nv_inference_queue_duration_us"):
        assert sample(name, model="simple") > 0
    assert sample("nv_cpu_memory_total_bytes") > 0
    assert ask(v2, "GET", "/v2/metrics")[0] == 200
