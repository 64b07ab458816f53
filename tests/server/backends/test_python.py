"""Python models through a repository: what they see, what they may answer, whom they may call, how they fail."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.server.backends.served import Served, ServerError, arrays, write_model
from trine.core.errors import ModelLoadError
from trine.server.tensors import Tensor

MODELS = Path(__file__).parent / "python_models"
NUMBER = (
    'input { name: "N" data_type: TYPE_INT32 dims: [ 1 ] } output { name: "VALUE" data_type: TYPE_INT32 dims: [ 1 ] }'
)
ARITHMETIC = """
    input [ { name: "LEFT" data_type: TYPE_FP32 dims: [ -1 ] }, { name: "RIGHT" data_type: TYPE_FP32 dims: [ -1 ] } ]
    output [ { name: "SUM" data_type: TYPE_FP32 dims: [ -1 ] }, { name: "ABOUT" data_type: TYPE_STRING dims: [ 1 ] } ]
"""
WHAT = (
    'input { name: "WHAT" data_type: TYPE_STRING dims: [ 1 ] } '
    'output { name: "RESULT" data_type: TYPE_STRING dims: [ 1 ] }'
)
FAULTY = (
    'input { name: "DO" data_type: TYPE_STRING dims: [ 1 ] } output { name: "PID" data_type: TYPE_INT64 dims: [ 1 ] }'
)
METER = (
    'input { name: "IN" data_type: TYPE_INT32 dims: [ 1 ] } output { name: "OUT" data_type: TYPE_INT32 dims: [ 1 ] }'
)
DECOUPLED = "model_transaction_policy { decoupled: true }"


def add(folder: Path, name: str, source: str, config: str) -> Path:
    text = f'backend: "python"\n{config}' if config else ""
    return write_model(folder, name, text, {"1/model.py": (MODELS / f"{source}.py").read_text()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    add(place, "arithmetic", "arithmetic", ARITHMETIC)
    add(place, "echo", "echo", "")
    add(place, "counter", "counter", NUMBER + DECOUPLED)
    add(place, "coroutine", "coroutine", NUMBER + DECOUPLED)
    add(place, "caller", "caller", WHAT)
    add(place, "meter", "meter", METER)
    add(place, "later", "counter", NUMBER + DECOUPLED)
    iterative = "max_batch_size: 4 sequence_batching { iterative_sequence: true }"
    add(place, "countdown", "countdown", NUMBER + iterative)
    add(place, "countdown_decoupled", "countdown", NUMBER + iterative + DECOUPLED)
    return place


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    names = ("arithmetic", "echo", "counter", "coroutine", "caller", "meter", "countdown", "countdown_decoupled")
    with Served(folder, control_mode="explicit", load_models=names) as repository:
        yield repository


def strings(*texts: str) -> np.ndarray[Any, Any]:
    array = np.empty(len(texts), dtype=object)
    array[:] = [text.encode() for text in texts]
    return array


ONE, TWO = np.arange(4, dtype=np.float32), np.full(4, 2, dtype=np.float32)
PAIR = {"LEFT": ONE, "RIGHT": TWO}


# --- requests and responses -------------------------------------------------------------------------------------------


def test_a_model_computes(served: Served) -> None:
    np.testing.assert_array_equal(served.ask("arithmetic", PAIR)["SUM"], ONE + TWO)
    np.testing.assert_array_equal(ONE, np.arange(4))  # what the model did to its input is its own affair


@pytest.mark.parametrize("size", [0, 1, 1_000, 300_000])
def test_tensors_of_any_size(served: Served, size: int) -> None:
    left = np.random.default_rng(size).standard_normal(size, dtype=np.float32)
    for _ in range(3):
        np.testing.assert_array_equal(served.ask("arithmetic", {"LEFT": left, "RIGHT": left})["SUM"], left + left)


def test_what_a_request_tells(served: Served) -> None:
    parameters = {"text": "a", "number": 7, "fraction": 0.5, "flag": True}
    (response,) = served.responses(
        "arithmetic",
        PAIR,
        id="me",
        parameters=parameters,
        timeout_us=5_000_000,
        sequence_id="s",
        sequence_start=True,
        sequence_end=True,
    )
    about = json.loads(arrays(response)["ABOUT"][0])
    about.pop("pid")
    assert about == {
        "id": "me",
        "correlation": "s",
        "flags": 3,
        "timeout": 5_000_000,
        "parameters": parameters,
        "outputs": ["ABOUT", "SUM"],
        "batch": 1,
    }
    assert response.parameters == {"text": "yes", "number": 3, "flag": True}


def test_only_requested_outputs_are_sent(served: Served) -> None:
    assert list(served.ask("arithmetic", PAIR, outputs=["SUM"])) == ["SUM"]


def test_an_error_keeps_its_code(served: Served) -> None:
    with pytest.raises(ServerError, match="no such thing") as caught:
        served.ask("arithmetic", PAIR, parameters={"do": "error"})
    assert caught.value.status == 404


def test_an_exception_becomes_the_requests_error(served: Served) -> None:
    with pytest.raises(ServerError, match="ValueError: on purpose") as caught:
        served.ask("arithmetic", PAIR, parameters={"do": "raise"})
    assert caught.value.status == 500
    text = str(caught.value)
    assert text.startswith("Failed to process the request(s) for model 'arithmetic_0_0', message: ")
    assert "model.py(" in text
    np.testing.assert_array_equal(served.ask("arithmetic", PAIR)["SUM"], ONE + TWO)


def test_a_wrong_answer_is_an_error(served: Served) -> None:
    with pytest.raises(ServerError, match="Expected an 'InferenceResponse' object"):
        served.ask("arithmetic", PAIR, parameters={"do": "nothing"})


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("BOOL", np.bool_),
        ("UINT8", np.uint8),
        ("UINT64", np.uint64),
        ("INT16", np.int16),
        ("INT64", np.int64),
        ("FP16", np.float16),
        ("FP64", np.float64),
    ],
)
def test_datatypes_through_dlpack(served: Served, name: str, dtype: type) -> None:
    values = np.random.default_rng(1).integers(0, 2, (3, 5)).astype(dtype)
    answer = served.ask("echo", {f"IN_{name}": values})[f"OUT_{name}"]
    assert answer.dtype == values.dtype
    np.testing.assert_array_equal(answer, values)


def test_bfloat16_through_dlpack(served: Served) -> None:
    bits = np.arange(6, dtype=np.uint16).reshape(2, 3)
    (response,) = served.responses("echo", {"IN_BF16": Tensor("IN_BF16", "BF16", (2, 3), bits)})
    (tensor,) = response.outputs
    assert (tensor.name, tensor.datatype, tensor.shape) == ("OUT_BF16", "BF16", (2, 3))
    np.testing.assert_array_equal(tensor.array, bits)


def test_strings_are_bytes(served: Served) -> None:
    given = np.empty(4, dtype=object)
    given[:] = [b"", b"\x00\xff", "ö".encode(), b"x" * 100_000]
    assert served.ask("echo", {"IN": given})["OUT"].tolist() == given.tolist()


def test_auto_complete_fills_the_configuration(served: Served) -> None:
    config = served.repository.model("echo").config
    assert [tensor.name for tensor in config.input][:2] == ["IN", "IN_BOOL"]
    assert all(tensor.optional for tensor in config.input)
    assert config.max_batch_size == 0


# --- decoupled --------------------------------------------------------------------------------------------------------


def number(value: int) -> dict[str, np.ndarray[Any, Any]]:
    return {"N": np.array([value], np.int32)}


@pytest.mark.parametrize("count", [0, 1, 500])
def test_any_number_of_responses_from_a_thread(served: Served, count: int) -> None:
    *responses, last = served.responses("counter", number(count))
    assert [int(arrays(response)["VALUE"][0]) for response in responses] == list(range(count))
    assert last.final
    assert last.is_empty


def test_a_closed_sender_sends_nothing(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        served.responses("counter", number(1), parameters={"do": "twice"})
        served.sleep(0.1)
    assert any("Response sender has been closed" in record.message for record in caplog.records)


def test_requests_are_answered_side_by_side(served: Served) -> None:
    began = time.monotonic()
    asked = [served.submit("coroutine", number(1)) for _ in range(10)]
    for one in asked:
        served.run(one.finished)
    assert max(int(arrays(one.responses[0])["VALUE"][0]) for one in asked) > 1
    assert time.monotonic() - began < 10 * 0.2 * 5


def test_a_coroutine_that_fails_ends_its_requests(served: Served) -> None:
    with pytest.raises(ServerError, match="ValueError: negative"):
        served.ask("coroutine", number(-1))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("return", "the execute function must return None"),
        ("raise", "RuntimeError: on purpose"),
        ("drop", "dropped the request without its final response"),
    ],
)
def test_decoupled_models_that_misbehave(served: Served, what: str, message: str) -> None:
    with pytest.raises(ServerError, match=message):
        served.ask("counter", number(1), parameters={"do": what})


def test_cancellation_reaches_the_model(served: Served) -> None:
    asked = served.submit("counter", number(1_000_000), parameters={"do": "slowly"})
    served.sleep(0.1)
    served.call(asked.request.cancel)
    served.run(asked.finished)
    error = asked.responses[-1].error
    assert error is not None
    assert "cancelled at" in str(error)


# --- iterative sequences ----------------------------------------------------------------------------------------------


def test_a_request_is_executed_until_it_has_its_answer(served: Served) -> None:
    asked = [served.submit("countdown", {"N": np.array([[count]], np.int32)}) for count in (1, 3, 6)]
    for one in asked:
        served.run(one.finished)
        assert [arrays(response)["VALUE"].tolist() for response in one.responses] == [[[0]]]


def test_a_rescheduled_request_may_answer_each_time(served: Served) -> None:
    responses = served.responses("countdown_decoupled", {"N": np.array([[4]], np.int32)})
    assert [int(arrays(response)["VALUE"][0, 0]) for response in responses] == [3, 2, 1, 0]


# --- calls of other models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("sync", 500_500.0),
        ("many", 500_500.0),
        ("unknown", "Request for unknown model: 'nobody' is not found"),
        ("their_error", [2, "no such thing"]),
        ("decoupled", [[0], [1], [2], []]),
        ("decoupled_async", [2, 4]),
        ("cancel", True),
        ("control", [False, True, False]),
    ],
)
def test_business_logic(served: Served, what: str, expected: object) -> None:
    assert json.loads(served.ask("caller", {"WHAT": strings(what)})["RESULT"][0]) == expected


def test_calls_carry_ids_flags_and_parameters(served: Served) -> None:
    about = json.loads(served.ask("caller", {"WHAT": strings("about")})["RESULT"][0])
    assert (about["id"], about["correlation"], about["flags"], about["timeout"]) == ("inner", "c-1", 3, 9_000_000)
    assert about["parameters"] == {"mine": 1.5}
    assert about["outputs"] == ["ABOUT"]


@pytest.mark.parametrize(
    ("what", "message"),
    [("not_decoupled", "decoupled=True"), ("control_refused", "refused: failed to load 'nobody'")],
)
def test_calls_that_are_refused(served: Served, what: str, message: str) -> None:
    assert message in json.loads(served.ask("caller", {"WHAT": strings(what)})["RESULT"][0])


# --- metrics, log, readiness ------------------------------------------------------------------------------------------


def test_metrics_of_a_models_own(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            served.responses("meter", {"IN": np.zeros(1, np.int32)})
    assert [record.levelname for record in caplog.records if "measured" in record.message] == ["WARNING"] * 2
    lines = served.repository.metrics.render().decode().splitlines()
    assert "# HELP test_requests Requests\\nso far" in lines
    assert "# TYPE test_sizes histogram" in lines
    label = 'kind="a \\"quoted\\" one"'
    for line in (
        'test_requests{model="meter"} 2',
        "test_level 1.5",
        f"test_sizes_count{{{label}}} 6",
        f"test_sizes_sum{{{label}}} 112",
        f'test_sizes_bucket{{{label},le="1"}} 2',
        f'test_sizes_bucket{{{label},le="10.5"}} 4',
        f'test_sizes_bucket{{{label},le="+Inf"}} 6',
    ):
        assert line in lines


def test_readiness_is_the_models_word(served: Served, folder: Path) -> None:
    (worker,) = served.repository.model("meter").pool.workers
    instance: Any = worker.instance
    assert served.run(instance.is_ready())
    assert served.run(served.repository.ask_ready("meter"))
    flag = folder / "meter" / "not_ready"
    flag.touch()
    try:
        assert not served.run(instance.is_ready())
        assert not served.run(served.repository.ask_ready("meter"))
    finally:
        flag.unlink()
    (worker,) = served.repository.model("coroutine").pool.workers
    assert served.run(worker.instance.is_ready())  # type: ignore[union-attr]


def test_unloading_finalizes_and_takes_the_metrics_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add(tmp_path, "meter", "meter", METER)
    with caplog.at_level(logging.INFO), Served(tmp_path) as served:
        assert b"test_level" in served.repository.metrics.render()
    assert any("finalized" in record.message for record in caplog.records)
    assert served.repository.metrics.render() == b""


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("models")
    limit = 'parameters { key: "MEMORY_LIMIT" value { string_value: "300MiB" } }'
    add(place, "faulty", "faulty", FAULTY + "instance_group { count: 1 }" + limit)
    settings = {"python": {"stub-timeout-seconds": "3"}}
    with Served(place, backend_settings=settings) as repository:
        yield repository


def pid(served: Served, what: str = "") -> int:
    return int(served.ask("faulty", {"DO": strings(what)})["PID"][0])


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("segfault", "was ended by SIGSEGV"),
        ("exit", "exited with status 3"),
        ("fork", "was ended by SIGKILL"),
        ("hang", "did not finish a batch within 3 s"),
    ],
)
def test_a_model_that_fails_is_named_and_started_again(faulty: Served, what: str, reason: str) -> None:
    before = [pid(faulty) for _ in range(10)][-1]  # quick and alone: the event loop waits for the answers
    failing = faulty.submit("faulty", {"DO": strings(what)})
    behind = faulty.submit("faulty", {"DO": strings("")})
    faulty.run(failing.finished)
    error = failing.responses[0].error
    assert error is not None
    assert error.status == 500
    assert reason in str(error)
    assert "faulty_0_0" in str(error)
    faulty.run(behind.finished)
    assert arrays(behind.responses[0])["PID"][0] not in (0, before)
    assert pid(faulty) != before


def test_leaving_by_sys_exit_is_an_error_like_others(faulty: Served) -> None:
    before = pid(faulty)
    with pytest.raises(ServerError, match="SystemExit: 3"):
        pid(faulty, "sys.exit")
    assert pid(faulty) == before


def test_a_model_that_leaks_is_started_again_between_batches(faulty: Served) -> None:
    first = pid(faulty)
    seen = set()
    for _ in range(40):
        seen.add(pid(faulty, "leak"))  # none of them fails
        faulty.sleep(0.4)  # slow enough for the look at its memory, once a second, to find it just above the limit
        if len(seen - {first}) >= 1:
            break
    assert seen - {first}


def test_processes_end_with_their_server(tmp_path: Path) -> None:
    add(tmp_path, "faulty", "faulty", FAULTY)
    with Served(tmp_path) as served:
        process = pid(served)
        os.kill(process, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("class TritonPythonModel\n", "SyntaxError"),
        ("import no_such_package\n", "No module named 'no_such_package'"),
        ("x = 1\n", "defines no class TritonPythonModel"),
        ("class TritonPythonModel:\n    pass\n", "does not implement `execute`"),
        (
            "class TritonPythonModel:\n    def initialize(self, args):\n        raise KeyError('weights')\n"
            "    def execute(self, requests):\n        pass\n",
            "KeyError: 'weights'",
        ),
        ("import os\nos._exit(9)\n", "exited with status 9"),
        (
            "class TritonPythonModel:\n    @staticmethod\n    def auto_complete_config(config):\n"
            "        config.add_input({'name': 'X'})\n",
            "missing 'data_type' property",
        ),
    ],
)
def test_models_that_can_not_be_loaded_say_why(tmp_path: Path, source: str, message: str) -> None:
    write_model(tmp_path, "broken", f'backend: "python"\n{METER}', {"1/model.py": source})
    with pytest.raises(ModelLoadError, match=message), Served(tmp_path):
        pass


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_model(tmp_path, "empty", f'backend: "python"\n{METER}', {"1/other.py": ""})
    with pytest.raises(ModelLoadError, match=r"Python model file not found in '.*1/model.py'"), Served(tmp_path):
        pass


# --- environments -----------------------------------------------------------------------------------------------------

WHERE = """
import sys
import numpy as np
import triton_python_backend_utils as pb_utils
from marker import MARK
from .neighbour import NEIGHBOUR

class TritonPythonModel:
    def execute(self, requests):
        found = pb_utils.Tensor("PREFIX", np.array([sys.prefix, MARK, NEIGHBOUR], dtype=object))
        return [pb_utils.InferenceResponse([found]) for _ in requests]
"""


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_brings_its_own_environment(tmp_path: Path, packed: bool) -> None:
    name = "environment.tar.gz" if packed else "environment"
    config = f"""
        backend: "python"
        input {{ name: "IN" data_type: TYPE_INT32 dims: [ 1 ] }}
        output {{ name: "PREFIX" data_type: TYPE_STRING dims: [ 3 ] }}
        parameters {{ key: "EXECUTION_ENV_PATH" value {{ string_value: "$$TRITON_MODEL_DIRECTORY/{name}" }} }}
    """
    files = {"1/model.py": WHERE, "1/neighbour.py": "NEIGHBOUR = 'next door'\n"}
    place = write_model(tmp_path, "where", config, files)
    environment = place / "environment"
    venv.create(environment, symlinks=True, with_pip=False)
    packages = next(environment.glob("lib/python*/site-packages"))
    (packages / "marker.py").write_text("MARK = 'its own'\n")
    (packages / "numpy.pth").write_text(str(Path(np.__file__).parent.parent) + "\n")
    if packed:
        shutil.make_archive(str(environment), "gztar", environment)
        shutil.rmtree(environment)
    with Served(tmp_path) as served:
        prefix, mark, neighbour = served.ask("where", {"IN": np.zeros(1, np.int32)})["PREFIX"].tolist()
    assert (mark, neighbour) == (b"its own", b"next door")
    assert prefix.decode() != sys.prefix
    assert packed or prefix.decode() == str(environment)


@pytest.mark.parametrize(
    ("path", "message"),
    [("$$TRITON_MODEL_DIRECTORY/nowhere", "does not exist"), ("$$TRITON_MODEL_DIRECTORY/1", "holds no bin/python")],
)
def test_an_environment_that_is_none_is_refused(tmp_path: Path, path: str, message: str) -> None:
    parameter = f'parameters {{ key: "EXECUTION_ENV_PATH" value {{ string_value: "{path}" }} }}'
    add(tmp_path, "faulty", "faulty", FAULTY + parameter)
    with pytest.raises(ModelLoadError, match=message), Served(tmp_path):
        pass
