"""tritonclient's four clients over the surface of the protocol: the rows of health, metadata, inference, repository,
shared memory, statistics and settings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tritonclient.utils.shared_memory as shm
from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from tests.conformance.server.v2 import Client, RunningServer, write_add_sub
from trine.server.tensors import NUMPY_TYPES

FIRST = np.arange(16, dtype=np.int32).reshape(1, 16)
SECOND = np.full((1, 16), 3, dtype=np.int32)
ONE = np.array([1], np.int32)


def refused(status: str, *texts: str) -> Any:
    """pytest.raises for a refusal; `status` is the HTTP one and the gRPC one, "400 INVALID_ARGUMENT"."""

    class Refusal:
        def __enter__(self) -> None:
            self.context = pytest.raises(InferenceServerException)
            self.info = self.context.__enter__()

        def __exit__(self, *details: Any) -> bool:
            done = bool(self.context.__exit__(*details))
            error = self.info.value
            http, grpc = status.split()
            given = str(error.status()).removeprefix("StatusCode.")
            assert given in (http, grpc), error
            for text in texts:
                assert text in error.message()
            return done

    return Refusal()


def test_health(client: Client) -> None:
    assert client.call("is_server_live")
    assert client.call("is_server_ready")
    assert client.call("is_model_ready", "simple")
    assert client.call("is_model_ready", "simple", "1")
    assert not client.call("is_model_ready", "simple", "9")
    assert not client.call("is_model_ready", "nobody")


def test_server_metadata(client: Client) -> None:
    metadata = client.described("get_server_metadata")
    assert metadata["name"] == "triton"
    assert metadata["extensions"][:5] == [
        "classification",
        "sequence",
        "model_repository",
        "model_repository(unload_dependents)",
        "schedule_policy",
    ]
    assert metadata["extensions"][-4:] == ["parameters", "statistics", "trace", "logging"]


def test_model_metadata(client: Client) -> None:
    metadata = client.described("get_model_metadata", "simple")
    assert metadata["name"] == "simple"
    assert metadata["versions"] == ["1"]
    assert metadata["platform"] == "onnxruntime_onnx"
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["INPUT0", "INPUT1"]
    shape = metadata["outputs"][0]["shape"]
    assert [int(dim) for dim in shape] == [-1, 16]
    with refused("404 NOT_FOUND", "Request for unknown model: 'nobody' is not found"):
        client.described("get_model_metadata", "nobody")
    with refused("404 NOT_FOUND", "Request for unknown model: 'simple' version 3 is not found"):
        client.described("get_model_metadata", "simple", "3")


def test_configuration_is_a_model_config(client: Client) -> None:
    config = client.described("get_model_config", "simple")
    parsed = json_format.ParseDict(config if client.is_http else config["config"], model_config_pb2.ModelConfig())
    assert parsed.max_batch_size == 8
    assert parsed.input[0].name == "INPUT0"
    assert parsed.HasField("dynamic_batching")
    assert parsed.instance_group[0].count >= 1
    assert parsed.version_policy.latest.num_versions == 1


def values_of(datatype: str) -> np.ndarray[Any, Any]:
    dtype = NUMPY_TYPES[datatype]
    if datatype == "BYTES":
        return np.array([b"", b"one", "zwölf".encode(), b"x" * 300], dtype=object)
    if datatype == "BOOL":
        return np.array([True, False, True])
    if datatype == "BF16":
        return np.array([0.0, 1.5, -2.0, 1e30], dtype=ml_dtypes.bfloat16)
    if dtype.kind == "f":
        return np.array([0.1, -1.5, 65504.0, 0.0], dtype=dtype)
    limits = np.iinfo(dtype)
    return np.array([limits.min, 0, 1, limits.max], dtype=dtype)


@pytest.mark.parametrize("datatype", NUMPY_TYPES)
def test_every_datatype_in_binary(client: Client, datatype: str) -> None:
    values = values_of(datatype)
    result = client.infer(f"identity_{datatype.lower()}", [client.input("INPUT0", values, datatype)])
    answer = result.as_numpy("OUTPUT0")
    assert answer.tolist() == values.tolist()


@pytest.mark.parametrize("datatype", NUMPY_TYPES)
@pytest.mark.parametrize("binary_output", [False, True])
@pytest.mark.parametrize("client", ["http", "http.aio"], indirect=True)
def test_every_datatype_in_json(client: Client, datatype: str, binary_output: bool) -> None:
    values = values_of(datatype)
    if datatype == "BYTES":
        values = values[:3]
    tensor = client.input("INPUT0", values, datatype, binary=datatype in ("FP16", "BF16"))
    outputs = [client.output("OUTPUT0", binary=binary_output)]
    if datatype in ("FP16", "BF16") and not binary_output:
        with refused("400 -", f"sending {datatype} data via JSON is not supported"):
            client.infer(f"identity_{datatype.lower()}", [tensor], outputs=outputs)
        return
    result = client.infer(f"identity_{datatype.lower()}", [tensor], outputs=outputs)
    answer = result.as_numpy("OUTPUT0")
    if datatype == "BYTES" and not binary_output:
        assert [item if isinstance(item, bytes) else item.encode() for item in answer] == values.tolist()
    else:
        assert answer.tolist() == values.tolist()


@pytest.mark.parametrize("client", ["http", "http.aio"], indirect=True)
def test_numbers_that_json_has_not(client: Client) -> None:
    values = np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)
    tensor = client.input("INPUT0", values, "FP32")
    result = client.infer("identity_fp32", [tensor], outputs=[client.output("OUTPUT0", binary=False)])
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), values)


def test_outputs_ids_and_versions(client: Client) -> None:
    result = client.add_sub(FIRST, SECOND, request_id="mine", model_version="1")
    response = result.get_response() if client.is_http else result.get_response(as_json=True)
    assert response["id"] == "mine"
    assert response["model_version"] == "1"
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), FIRST + SECOND)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), FIRST - SECOND)
    result = client.add_sub(FIRST, SECOND, outputs=[client.output("OUTPUT1")])
    assert result.as_numpy("OUTPUT0") is None
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), FIRST - SECOND)


def test_classification(client: Client) -> None:
    rows = np.concatenate([FIRST, FIRST[:, ::-1]])
    result = client.add_sub(rows, np.concatenate([SECOND, SECOND]), outputs=[client.output("OUTPUT0", class_count=3)])
    assert result.as_numpy("OUTPUT0").tolist() == [
        [b"18:15:class15", b"17:14:class14", b"16:13:class13"],
        [b"18:0:class0", b"17:1:class1", b"16:2:class2"],
    ]
    tensor = client.input("INPUT0", np.array([0.5, 2.25, 2.25, -1], np.float32), "FP32")
    result = client.infer("identity_fp32", [tensor], outputs=[client.output("OUTPUT0", class_count=9)])
    assert result.as_numpy("OUTPUT0").tolist() == [b"2.250000:1", b"2.250000:2", b"0.500000:0", b"-1.000000:3"]
    with refused("400 INVALID_ARGUMENT", "class result not available for output due to unsupported type 'BYTES'"):
        strings = client.input("INPUT0", np.array([b"a"], dtype=object), "BYTES")
        client.infer("identity_bytes", [strings], outputs=[client.output("OUTPUT0", class_count=1)])


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compression(client: Client, algorithm: str) -> None:
    values = np.zeros(40_000, np.float32)
    tensor = client.input("INPUT0", values, "FP32")
    options: dict[str, Any] = (
        {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
        if client.is_http
        else {"compression_algorithm": algorithm}
    )
    result = client.infer("identity_fp32", [tensor], **options)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), values)


@pytest.mark.parametrize("sequence_id", [4242, "a-name"])
def test_sequences(client: Client, sequence_id: int | str) -> None:
    key = f"{sequence_id}-{client.kind}" if isinstance(sequence_id, str) else sequence_id + len(client.kind)
    totals = []
    for index, value in enumerate((5, 6, 7)):
        tensor = client.input("INPUT", np.array([[value]], np.int32), "INT32")
        result = client.infer(
            "accumulate", [tensor], sequence_id=key, sequence_start=index == 0, sequence_end=index == 2
        )
        totals.append(int(result.as_numpy("OUTPUT")[0, 0]))
    assert totals == [5, 11, 18]
    with refused("400 INVALID_ARGUMENT", "must specify the START flag on the first request of the sequence"):
        client.infer("accumulate", [tensor], sequence_id=key)


def test_parameters(client: Client) -> None:
    given = {"count": 3, "name": "x", "on": False}
    result = client.infer("parameters", [client.input("IN", ONE, "INT32")], parameters=given)
    text = result.as_numpy("OUT")[0]
    assert json.loads(text) == given
    if client.is_http:
        answer = result.get_response()["parameters"]
    else:
        answer = {
            key: getattr(value, value.WhichOneof("parameter_choice"))
            for key, value in result.get_response().parameters.items()
        }
    assert answer == {"number": 7, "text": "seven", "flag": True, "share": 0.5}


def test_priority_and_timeout(client: Client) -> None:
    result = client.add_sub(FIRST, SECOND, priority=1, timeout=2_000_000)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), FIRST + SECOND)


def test_refusals(client: Client) -> None:
    with refused("404 NOT_FOUND", "Request for unknown model: 'nobody' is not found"):
        client.infer("nobody", [client.input("INPUT0", FIRST, "INT32")])
    with refused(
        "400 INVALID_ARGUMENT",
        "[request id: <id_unknown>] expected 2 inputs but got 1 inputs for model 'simple'. Got input(s) ['INPUT0'], "
        "but missing required input(s) ['INPUT1']. Please provide all required input(s).",
    ):
        client.infer("simple", [client.input("INPUT0", FIRST, "INT32")])
    with refused("400 INVALID_ARGUMENT", "inference input 'INPUT1' data-type is 'FP32', but model 'simple' expects"):
        wrong = client.input("INPUT1", SECOND.astype(np.float32), "FP32")
        client.infer("simple", [client.input("INPUT0", FIRST, "INT32"), wrong])
    with refused("400 INVALID_ARGUMENT", "[request id: me] inference request batch-size must be <= 8 for 'simple'"):
        client.add_sub(np.zeros((9, 16), np.int32), np.zeros((9, 16), np.int32), request_id="me")
    with refused("400 INVALID_ARGUMENT", "batch size does not match other inputs for 'simple'"):
        client.add_sub(np.zeros((2, 16), np.int32), np.zeros((1, 16), np.int32))
    with refused(
        "400 INVALID_ARGUMENT", "unexpected shape for input 'INPUT0' for model 'simple'. Expected [-1,16], got"
    ):
        client.add_sub(np.zeros((1, 8), np.int32), np.zeros((1, 8), np.int32))
    with refused("400 INVALID_ARGUMENT", "unexpected inference output 'NOTHING' for model 'simple'"):
        client.add_sub(FIRST, SECOND, outputs=[client.output("NOTHING")])
    with refused("501 UNIMPLEMENTED", "doesn't support models with decoupled transaction policy"):
        client.infer("repeat", [client.input("IN", ONE, "INT32")])
    with refused("500 INTERNAL", "a mistake of the model"):
        client.infer("failing", [client.input("IN", ONE, "INT32")])


def test_statistics(client: Client) -> None:
    def success() -> int:
        stats = client.described("get_inference_statistics", "simple")["model_stats"][0]
        return int(stats["inference_stats"]["success"].get("count", 0))

    before = success()
    client.add_sub(FIRST, SECOND)
    assert success() == before + 1
    everything = client.described("get_inference_statistics")["model_stats"]
    assert {"simple", "repeat"} <= {stats["name"] for stats in everything}
    stats = client.described("get_inference_statistics", "simple", "1")["model_stats"][0]
    assert int(stats["inference_count"]) >= 1
    assert int(stats["execution_count"]) >= 1
    assert stats["batch_stats"]
    assert int(stats["last_inference"]) > 1_600_000_000_000
    with refused("400 INVALID_ARGUMENT", "requested model 'nobody' is not available"):
        client.described("get_inference_statistics", "nobody")


def test_repository(client: Client, repository_path: Path) -> None:
    index = client.described("get_model_repository_index")
    entries = index if client.is_http else index["models"]
    assert {"name": "simple", "version": "1", "state": "READY"} in entries
    client.call("unload_model", "simple")
    for _ in range(200):
        if not client.call("is_model_ready", "simple"):
            break
    index = client.described("get_model_repository_index")
    entries = index if client.is_http else index["models"]
    assert next(entry["state"] for entry in entries if entry["name"] == "simple") != "READY"
    client.call("load_model", "simple")
    assert client.call("is_model_ready", "simple")
    with refused("400 INVALID_ARGUMENT", "failed to load 'nobody', failed to poll from model repository"):
        client.call("load_model", "nobody")


def test_load_with_config_and_files(client: Client, tmp_path: Path) -> None:
    config = {
        "name": "simple",
        "backend": "onnxruntime",
        "max_batch_size": 4,
        "version_policy": {"specific": {"versions": [7]}},
    }
    write_add_sub(tmp_path / "model.onnx", factor=5)
    files = {"file:7/model.onnx": (tmp_path / "model.onnx").read_bytes()}
    client.call("load_model", "simple", config=json.dumps(config), files=files)
    try:
        assert client.described("get_model_metadata", "simple")["versions"] == ["7"]
        result = client.add_sub(FIRST, SECOND)
        np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), 5 * (FIRST - SECOND))
        with refused("400 INVALID_ARGUMENT", "must be <= 4 for 'simple'"):
            client.add_sub(np.zeros((5, 16), np.int32), np.zeros((5, 16), np.int32))
    finally:
        client.call("load_model", "simple")
    assert client.described("get_model_metadata", "simple")["versions"] == ["1"]


def test_system_shared_memory(client: Client) -> None:
    size = FIRST.nbytes
    handle = shm.create_shared_memory_region("conformance", "/trine_conformance", 4 * size)
    try:
        shm.set_shared_memory_region(handle, [FIRST, SECOND])
        client.call("register_system_shared_memory", "conformance", "/trine_conformance", 4 * size)
        status = client.described("get_system_shared_memory_status")
        regions = status if client.is_http else list(status["regions"].values())
        assert [(region["name"], int(region["byte_size"])) for region in regions] == [("conformance", 4 * size)]
        first = client.module.InferInput("INPUT0", [1, 16], "INT32")
        first.set_shared_memory("conformance", size)
        second = client.module.InferInput("INPUT1", [1, 16], "INT32")
        second.set_shared_memory("conformance", size, offset=size)
        output = client.output("OUTPUT0")
        output.set_shared_memory("conformance", size, offset=2 * size)
        result = client.infer("simple", [first, second], outputs=[output, client.output("OUTPUT1")])
        answer = shm.get_contents_as_numpy(handle, np.int32, [1, 16], 2 * size)
        np.testing.assert_array_equal(answer, FIRST + SECOND)
        np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), FIRST - SECOND)
        with refused("400 INVALID_ARGUMENT", "Invalid offset + byte size for shared memory region: 'conformance'"):
            second.set_shared_memory("conformance", size, offset=4 * size)
            client.infer("simple", [first, second])
        with refused("400 ALREADY_EXISTS", "'conformance' already"):
            client.call("register_system_shared_memory", "conformance", "/trine_conformance", 4 * size)
    finally:
        client.call("unregister_system_shared_memory")
        shm.destroy_shared_memory_region(handle)
    with refused("404 NOT_FOUND", "Unable to find shared memory region: 'conformance'"):
        second.set_shared_memory("conformance", size)
        client.infer("simple", [first, second])
    with refused("400 INVALID_ARGUMENT", "Unable to open shared memory region: '/trine_nothing'"):
        client.call("register_system_shared_memory", "gone", "/trine_nothing", 64)
    with refused("404 NOT_FOUND", "Unable to find system shared memory region: 'gone'"):
        client.described("get_system_shared_memory_status", "gone")


def test_cuda_shared_memory_without_a_gpu(client: Client) -> None:
    status = client.described("get_cuda_shared_memory_status")
    assert not (status if client.is_http else status.get("regions"))
    handle = b"QUJD" * 21 + b"QQ=="  # 64 bytes
    with refused("400 INVALID_ARGUMENT", "no GPU"):
        client.call("register_cuda_shared_memory", "gpu", handle, 0, 64)
    client.call("unregister_cuda_shared_memory")


def test_trace_settings(client: Client) -> None:
    settings = client.described("get_trace_settings")
    settings = settings if client.is_http else {key: item["value"] for key, item in settings["settings"].items()}
    assert settings["trace_rate"] in ("1000", ["1000"])
    client.described("update_trace_settings", "simple", {"trace_rate": "7"})
    own = client.described("get_trace_settings", "simple")
    assert (own["trace_rate"] if client.is_http else own["settings"]["trace_rate"]["value"][0]) == "7"
    client.described("update_trace_settings", "simple", {"trace_rate": None})
    own = client.described("get_trace_settings", "simple")
    assert (own["trace_rate"] if client.is_http else own["settings"]["trace_rate"]["value"][0]) == "1000"
    with refused("501 UNIMPLEMENTED", "trace file location can not be updated through network protocol"):
        client.described("update_trace_settings", settings={"trace_file": "/tmp/x"})
    with refused("400 INVALID_ARGUMENT", "trace file name is not given"):
        client.described("update_trace_settings", settings={"trace_level": ["TIMESTAMPS"]})


def test_log_settings(client: Client) -> None:
    def level(answer: Any) -> int:
        return int(
            answer["log_verbose_level"]
            if client.is_http
            else answer["settings"]["log_verbose_level"].get("uint32_param", 0)
        )

    assert level(client.described("get_log_settings")) == 0
    assert level(client.described("update_log_settings", {"log_verbose_level": 1})) == 1
    assert level(client.described("update_log_settings", {"log_verbose_level": 0})) == 0
    with refused("501 UNIMPLEMENTED", "log file location can not be updated through network protocol"):
        client.described("update_log_settings", {"log_file": "/tmp/x"})
    with refused("503 UNAVAILABLE", "invalid argument for --log_format, got: bad"):
        client.described("update_log_settings", {"log_format": "bad"})


def test_queue_limits(client: Client, v2: RunningServer) -> None:
    """More requests than the queue takes are refused at once; one whose time is up is refused later."""
    import concurrent.futures

    from tests.conformance.server.v2 import Client as Another

    def ask(number: int) -> str:
        own = Another(client.kind, v2)
        try:
            own.infer("slow", [own.input("INPUT0", np.array([[1]], np.float32), "FP32")])
            return "ok"
        except InferenceServerException as error:
            return f"{str(error.status()).removeprefix('StatusCode.')} {error.message()}"
        finally:
            own.close()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert "ok" in answers
    refusals = [answer for answer in answers if answer != "ok"]
    assert refusals
    assert all(answer.startswith(("503", "UNAVAILABLE")) for answer in refusals)
    assert all("Exceeds maximum queue size" in answer for answer in refusals)
