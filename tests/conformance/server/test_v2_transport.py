"""Restricted APIs, forwarded headers, TLS, health and reflection, connection age, traces."""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from tests.conformance.server.v2 import RunningServer
from trine.server.application import GrpcSettings, ServerSettings
from trine.server.proto import health, reflection
from trine.server.repository import RepositorySettings


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "server.pem", folder / "server.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(cert),
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return str(cert), str(key)


@pytest.fixture(scope="module")
def closed(
    repository_path: Path, certificate: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A server with everything switched on that restricts or encrypts."""
    cert, key = certificate
    trace = tmp_path_factory.mktemp("trace") / "trace.json"
    settings = ServerSettings(
        restricted_http={"model-config": ("secret", "open"), "statistics": ("secret", "open")},
        restricted_grpc={"model-config": ("secret", "open"), "health": ("secret", "open")},
        forward_http="x-.*",
        forward_grpc="x-.*",
        http_tls=(cert, key),
        grpc=GrpcSettings(certificate=cert, key=key, root=cert, mutual=True, compression=6, max_age=30.0),
        trace_file=str(trace),
        trace={"trace_level": ["TIMESTAMPS", "TENSORS"], "trace_rate": 1},
        drain_seconds=1.0,
    )
    repository = RepositorySettings(
        directories=(str(repository_path),), control_mode="explicit", load_models=("simple", "parameters")
    )
    server = RunningServer(repository, settings)
    yield server, trace, cert, key
    server.close()


def test_https_and_restricted_apis(closed: Any) -> None:
    server, _, cert, _ = closed
    context = ssl.create_default_context(cafile=cert)

    def get(path: str, **headers: str) -> tuple[int, bytes]:
        host, _, port = server.http.partition(":")
        connection = http.client.HTTPSConnection(host, int(port), context=context, timeout=10)
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        answer = response.status, response.read()
        connection.close()
        return answer

    assert get("/v2/health/ready") == (200, b"")
    assert get("/v2/models/simple/config") == (403, b'{"error":"This API is restricted, expecting header \'secret\'"}')
    assert get("/v2/models/simple/config", secret="wrong")[0] == 403
    assert get("/v2/models/simple/config", secret="open")[0] == 200
    assert get("/v2/models/stats")[0] == 403


def tls_options(cert: str, key: str) -> dict[str, Any]:
    return {"ssl": True, "root_certificates": cert, "private_key": key, "certificate_chain": cert}


def test_mutual_tls_compression_and_restricted_protocols(closed: Any) -> None:
    server, _, cert, key = closed
    port = server.grpc.partition(":")[2]
    client = grpc_client.InferenceServerClient(f"localhost:{port}", **tls_options(cert, key))
    one = grpc_client.InferInput("IN", [1], "INT32")
    one.set_data_from_numpy(np.array([1], np.int32))
    result = client.infer("parameters", [one], headers={"x-tenant": "me"})
    assert json.loads(result.as_numpy("OUT")[0]) == {"x-tenant": "me"}
    with pytest.raises(InferenceServerException, match="This protocol is restricted, expecting header") as failure:
        client.get_model_config("simple")
    assert "UNAVAILABLE" in str(failure.value.status())
    assert client.get_model_config("simple", headers={"triton-grpc-protocol-secret": "open"}).config.name == "simple"
    with pytest.raises(InferenceServerException, match="restricted"):
        client.is_server_live()
    client.close()
    stranger = grpc_client.InferenceServerClient(f"localhost:{port}", ssl=True, root_certificates=cert)
    with pytest.raises(InferenceServerException):
        stranger.get_server_metadata(client_timeout=3)
    stranger.close()


def test_forwarded_headers(closed: Any) -> None:
    server, _, cert, _ = closed
    context = ssl.create_default_context(cafile=cert)
    host, _, port = server.http.partition(":")
    connection = http.client.HTTPSConnection(host, int(port), context=context, timeout=10)
    body = json.dumps({"inputs": [{"name": "IN", "shape": [1], "datatype": "INT32", "data": [1]}], "id": "traced"})
    connection.request("POST", "/v2/models/parameters/infer", body, {"X-Tenant": "you", "Other": "no"})
    answer = json.loads(connection.getresponse().read())
    assert json.loads(answer["outputs"][0]["data"][0]) == {"x-tenant": "you"}
    connection.close()


def test_a_trace_file(closed: Any) -> None:
    """The file has what Triton's own summary of traces reads."""
    server, trace, _, _ = closed
    server.in_loop(lambda: server.server.edges.tracer.flush())
    records = json.loads(trace.read_text())
    by_id: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        by_id.setdefault(record["id"], []).append(record)
    own = next(group for group in by_id.values() if group[0].get("request_id") == "traced")
    assert own[0]["model_name"] == "parameters"
    stamps = {stamp["name"]: stamp["ns"] for stamp in next(r for r in own if "timestamps" in r)["timestamps"]}
    order = [
        "HTTP_RECV_START",
        "REQUEST_START",
        "QUEUE_START",
        "COMPUTE_START",
        "COMPUTE_END",
        "REQUEST_END",
        "HTTP_SEND_END",
    ]
    assert [stamps[name] for name in order] == sorted(stamps[name] for name in order)
    assert next(record for record in own if "tensor" in record)["tensor"]["name"] == "IN"


def test_health_service(v2: RunningServer) -> None:
    with grpc.insecure_channel(v2.grpc) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health.HealthCheckRequest.SerializeToString,
            response_deserializer=health.HealthCheckResponse.FromString,
        )
        assert check(health.HealthCheckRequest()).status == health.HealthCheckResponse.SERVING
        service = health.HealthCheckRequest(service="inference.GRPCInferenceService")
        assert check(service).status == health.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as failure:
            check(health.HealthCheckRequest(service="nobody"))
        assert failure.value.code() == grpc.StatusCode.NOT_FOUND
        watch = channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health.HealthCheckRequest.SerializeToString,
            response_deserializer=health.HealthCheckResponse.FromString,
        )(health.HealthCheckRequest())
        assert next(watch).status == health.HealthCheckResponse.SERVING
        watch.cancel()


@pytest.mark.parametrize("package", ["grpc.reflection.v1", "grpc.reflection.v1alpha"])
def test_reflection(v2: RunningServer, package: str) -> None:
    with grpc.insecure_channel(v2.grpc) as channel:
        call = channel.stream_stream(
            f"/{package}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection.ServerReflectionResponse.FromString,
        )
        asked = [
            reflection.ServerReflectionRequest(list_services=""),
            reflection.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService"),
            reflection.ServerReflectionRequest(file_containing_symbol="inference.Nothing"),
        ]
        services, file, nothing = call(iter(asked))
    names = [service.name for service in services.list_services_response.service]
    assert "inference.GRPCInferenceService" in names
    assert "grpc.health.v1.Health" in names
    assert len(file.file_descriptor_response.file_descriptor_proto) == 2
    assert nothing.error_response.error_code == 5


def test_http2_that_is_none(v2: RunningServer) -> None:
    host, _, port = v2.grpc.partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=5)
    connection.request("GET", "/")
    with pytest.raises(http.client.HTTPException):
        connection.getresponse()
    connection.close()
    with grpc.insecure_channel(v2.grpc) as channel:
        assert service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerLive(service_pb2.ServerLiveRequest()).live


def test_client_shared_memory_is_off_unless_allowed(closed: Any) -> None:
    server, _, cert, key = closed
    port = server.grpc.partition(":")[2]
    client = grpc_client.InferenceServerClient(f"localhost:{port}", **tls_options(cert, key))
    with pytest.raises(InferenceServerException, match="--allow-client-shm"):
        client.register_system_shared_memory("r", "/x", 64)
    client.close()


def test_our_messages_and_the_clients_live_in_one_process() -> None:
    code = "import trine.server.proto, tritonclient.grpc.service_pb2; print('both')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "both\n"
