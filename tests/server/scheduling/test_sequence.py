"""The sequence batcher: places, order, controls, state, and sequences that go wrong."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.server.serving import infer, model_bytes, serving, start, write_model
from trine.server.errors import Code, ServerError
from trine.server.repository import Repository
from trine.server.tensors import Array

CONTROLS = """
  control_input [
    { name: "START" control [{ kind: CONTROL_SEQUENCE_START fp32_false_true: [0, 1] }] },
    { name: "READY" control [{ kind: CONTROL_SEQUENCE_READY fp32_false_true: [0, 1] }] },
    { name: "END" control [{ kind: CONTROL_SEQUENCE_END fp32_false_true: [0, 1] }] },
    { name: "CORRID" control [{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 }] }
  ]
  state [{ input_name: "SUM_IN" output_name: "SUM_OUT" data_type: TYPE_FP32 dims: [1] }]
"""


def accumulator() -> bytes:
    """ONNX. SUM_OUT = OUT = (1 − START) · SUM_IN + IN; FLAGS = [START, READY, END]; ID = CORRID; ROWS = batch size."""
    value = helper.make_tensor_value_info
    one = ["n", 1]
    inputs = [value(name, TensorProto.FLOAT, one) for name in ("IN", "START", "READY", "END", "SUM_IN")]
    inputs.append(value("CORRID", TensorProto.UINT64, one))
    outputs = [value(name, TensorProto.FLOAT, one) for name in ("OUT", "SUM_OUT", "ROWS")]
    outputs += [value("FLAGS", TensorProto.FLOAT, ["n", 3]), value("ID", TensorProto.UINT64, one)]
    nodes = [
        helper.make_node("Sub", ["one", "START"], ["goes_on"]),
        helper.make_node("Mul", ["goes_on", "SUM_IN"], ["kept"]),
        helper.make_node("Add", ["kept", "IN"], ["OUT"]),
        helper.make_node("Identity", ["OUT"], ["SUM_OUT"]),
        helper.make_node("Concat", ["START", "READY", "END"], ["FLAGS"], axis=1),
        helper.make_node("Identity", ["CORRID"], ["ID"]),
        helper.make_node("Mul", ["IN", "zero"], ["zeros"]),
        helper.make_node("Add", ["zeros", "one"], ["ones"]),
        helper.make_node("ReduceSum", ["ones", "axis"], ["count"], keepdims=1),
        helper.make_node("Add", ["zeros", "count"], ["ROWS"]),
    ]
    constants = [
        numpy_helper.from_array(np.float32([[1]]), "one"),
        numpy_helper.from_array(np.float32([[0]]), "zero"),
        numpy_helper.from_array(np.int64([0]), "axis"),
    ]
    return model_bytes(helper.make_graph(nodes, "accumulate", inputs, outputs, constants))


def write(root: Path, strategy: str, *, rows: int = 4, instances: int = 1, extra: str = "") -> None:
    folder = write_model(
        root,
        "sum",
        f"""max_batch_size: {rows}
        input [{{ name: "IN" data_type: TYPE_FP32 dims: [1] }}]
        output [{{ name: "OUT" data_type: TYPE_FP32 dims: [1] }}, {{ name: "FLAGS" data_type: TYPE_FP32 dims: [3] }},
                {{ name: "ID" data_type: TYPE_UINT64 dims: [1] }}, {{ name: "ROWS" data_type: TYPE_FP32 dims: [1] }}]
        instance_group [{{ kind: KIND_CPU count: {instances} }}]
        sequence_batching {{ {strategy} {CONTROLS} {extra} }}""",
    )
    (folder / "1" / "model.onnx").write_bytes(accumulator())


def send(repository: Repository, sequence: Any, value: float, flags: str = "", **options: Any) -> Any:
    return start(
        repository,
        "sum",
        {"IN": np.float32([[value]])},
        sequence_id=sequence,
        sequence_start="s" in flags,
        sequence_end="e" in flags,
        **options,
    )


async def outputs(future: Any) -> dict[str, Array]:
    return {tensor.name: tensor.array for tensor in (await future)[0].outputs}


@pytest.mark.parametrize("strategy", ["direct { }", "oldest { max_candidate_sequences: 4 }"])
async def test_sequences_have_their_own_state_and_controls(tmp_path: Path, strategy: str) -> None:
    write(tmp_path, strategy)
    async with serving(tmp_path) as repository:
        values = {7: [1, 2, 3], 8: [10, 20, 30], 9: [100, 200, 300]}
        futures = {
            key: [
                send(repository, key, value, "s" if i == 0 else "e" if i == 2 else "") for i, value in enumerate(given)
            ]
            for key, given in values.items()
        }
        for key, given in values.items():
            for i, future in enumerate(futures[key]):
                answer = await outputs(future)
                assert answer["OUT"].item() == sum(given[: i + 1])
                assert answer["FLAGS"].tolist() == [[float(i == 0), 1.0, float(i == 2)]]
                assert answer["ID"].item() == key
        assert not repository.model("sum").busy
        statistics = repository.model("sum").statistics
        assert statistics.success.count == 9
        assert statistics.execution_count == 3  # one batch for each position: three sequences side by side


async def test_a_slot_is_a_row_and_empty_ones_are_not_ready(tmp_path: Path) -> None:
    write(tmp_path, "direct { }")
    async with serving(tmp_path) as repository:
        await asyncio.gather(*(outputs(send(repository, key, key, "s")) for key in (1, 2, 3)))
        answer = await outputs(send(repository, 3, 5))  # alone, but in its slot: the third row of three
        assert answer["ROWS"].item() == 3
        assert answer["OUT"].item() == 8
        assert answer["FLAGS"].tolist() == [[0, 1, 0]]
        assert repository.model("sum").statistics.success.count == 4


async def test_a_sequence_must_start_and_have_one_row(tmp_path: Path) -> None:
    write(tmp_path, "direct { }")
    async with serving(tmp_path) as repository:
        with pytest.raises(ServerError) as unstarted:
            send(repository, 5, 1)
        assert unstarted.value.message == (
            "inference request for sequence 5 to model 'sum' must specify the START flag on the first request of the "
            "sequence"
        )
        with pytest.raises(ServerError, match="must specify a non-zero or non-empty correlation ID"):
            send(repository, 0, 1, "s")
        with pytest.raises(ServerError, match="must specify batch-size 1 due to requirements of sequence batcher"):
            start(repository, "sum", {"IN": np.ones((2, 1), np.float32)}, sequence_id=1, sequence_start=True)
        with pytest.raises(
            ServerError, match=r"control 'CORRID' data-type is 'BYTES', but model 'sum' expects 'UINT64'"
        ):
            send(repository, "text", 1, "s")
        await outputs(send(repository, 5, 1, "se"))
        with pytest.raises(ServerError, match="START flag"):  # it has ended
            send(repository, 5, 1)


async def test_an_id_starts_anew(tmp_path: Path) -> None:
    write(tmp_path, "direct { }")
    async with serving(tmp_path) as repository:
        assert (await outputs(send(repository, 1, 4, "s")))["OUT"].item() == 4
        assert (await outputs(send(repository, 1, 5, "s")))["OUT"].item() == 5  # the first was never ended
        ended, again = send(repository, 1, 6, "e"), send(repository, 1, 7, "s")
        assert (await outputs(ended))["OUT"].item() == 11
        assert (await outputs(again))["OUT"].item() == 7


@pytest.mark.parametrize("strategy", ["direct { }", "oldest { max_candidate_sequences: 1 }"])
async def test_sequences_beyond_the_places_wait_in_the_backlog(tmp_path: Path, strategy: str) -> None:
    write(tmp_path, strategy, rows=1)
    async with serving(tmp_path) as repository:
        assert (await outputs(send(repository, 1, 1, "s")))["OUT"].item() == 1
        waits = [send(repository, 2, 10, "s"), send(repository, 2, 20, "e")]
        late = send(repository, 3, 5, "s", timeout_us=30_000)
        with pytest.raises(ServerError, match=r"^timeout of the corresponding sequence has been expired$") as expired:
            await late
        assert expired.value.error_code is Code.UNAVAILABLE
        assert not waits[0].done()
        assert (await outputs(send(repository, 1, 2, "e")))["OUT"].item() == 3
        assert [(await outputs(future))["OUT"].item() for future in waits] == [10, 30]


async def test_an_idle_sequence_gives_its_place_back(tmp_path: Path) -> None:
    write(tmp_path, "direct { }", rows=1, extra="max_sequence_idle_microseconds: 50000")
    async with serving(tmp_path) as repository:
        await outputs(send(repository, 1, 1, "s"))
        assert (await outputs(send(repository, 2, 9, "se")))["OUT"].item() == 9
        with pytest.raises(ServerError, match="START flag"):
            send(repository, 1, 1)


async def test_cancelling_a_request_ends_its_sequence(tmp_path: Path) -> None:
    write(tmp_path, "direct { }", rows=1)
    async with serving(tmp_path) as repository:
        await outputs(send(repository, 1, 1, "s"))
        waits = [send(repository, 2, 1, "s"), send(repository, 2, 1, "")]
        waits[0].request.cancel()
        next_one = send(repository, 3, 4, "se")
        await outputs(send(repository, 1, 1, "e"))
        for future in waits:
            with pytest.raises(ServerError) as cancelled:
                await future
            assert cancelled.value.error_code is Code.CANCELLED
        assert (await outputs(next_one))["OUT"].item() == 4


async def test_sequences_spread_over_instances_and_stay(tmp_path: Path) -> None:
    write(tmp_path, "oldest { max_candidate_sequences: 2 }", rows=2, instances=2)
    async with serving(tmp_path) as repository:
        for step in range(4):
            flags = "s" if step == 0 else "e" if step == 3 else ""
            answers = await asyncio.gather(*(outputs(send(repository, key, 1, flags)) for key in range(1, 5)))
            assert [answer["OUT"].item() for answer in answers] == [step + 1] * 4
            assert [answer["ROWS"].item() for answer in answers] == [2] * 4


async def test_the_initial_state_comes_from_a_file(tmp_path: Path) -> None:
    write(tmp_path, "direct { }")
    folder = tmp_path / "sum"
    config = (folder / "config.pbtxt").read_text()
    state = 'state [{ input_name: "SUM_IN" output_name: "SUM_OUT" data_type: TYPE_FP32 dims: [1]'
    initial = ' initial_state [{ name: "first" data_type: TYPE_FP32 dims: [1] data_file: "first" }]'
    (folder / "config.pbtxt").write_text(config.replace(state, state + initial))
    (folder / "initial_state").mkdir()
    (folder / "initial_state" / "first").write_bytes(np.float32([1000]).tobytes())
    async with serving(tmp_path) as repository:
        # START is the model's own business: it drops the state here, so the second request shows nothing of it.
        assert (await outputs(send(repository, 1, 1, "s")))["OUT"].item() == 1
        scheduler: Any = repository.model("sum").scheduler
        assert scheduler._states.initial()["SUM_IN"].array.item() == 1000
    (folder / "initial_state" / "first").write_bytes(b"123")
    async with serving(tmp_path, exit_on_error=False) as repository:
        reason = repository.index()[0].reason
        assert "has 3 bytes" in reason
        assert "need 4" in reason


async def test_a_reload_does_not_break_sequences(tmp_path: Path) -> None:
    write(tmp_path, "direct { }")
    async with serving(tmp_path, control_mode="explicit", load_models=("sum",)) as repository:
        assert (await outputs(send(repository, 1, 1, "s")))["OUT"].item() == 1
        before = repository.model("sum")
        (tmp_path / "sum" / "1" / "model.onnx").write_bytes(accumulator() + b"")
        (tmp_path / "sum" / "1" / "notes.txt").write_text("changed")
        await repository.load("sum")
        assert repository.model("sum") is not before
        assert (await outputs(send(repository, 1, 2)))["OUT"].item() == 3  # where it began
        assert (await outputs(send(repository, 2, 5, "s")))["OUT"].item() == 5
        assert (await outputs(send(repository, 1, 3, "e")))["OUT"].item() == 6
        with pytest.raises(ServerError, match="START flag"):
            send(repository, 1, 1)


async def test_plain_requests_reach_models_beside(tmp_path: Path) -> None:
    write(tmp_path, "direct { }")
    write_model(
        tmp_path,
        "plain",
        """backend: "identity" input [{ name: "IN" data_type: TYPE_INT32 dims: [2] }]
        output [{ name: "OUT" data_type: TYPE_INT32 dims: [2] }]""",
    )
    async with serving(tmp_path) as repository:
        answer = await infer(repository, "plain", {"IN": np.int32([1, 2])})
        assert answer["OUT"].tolist() == [1, 2]


COUNTDOWN = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.left = {}

    def execute(self, requests):
        for request in requests:
            start = pb_utils.get_input_tensor_by_name(request, "START").as_numpy().item()
            key = request.correlation_id()
            if start:
                self.left[key] = int(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy().item())
            sender = request.get_response_sender()
            left = self.left[key]
            if left:
                self.left[key] = left - 1
                request.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.float32([[left]]))]))
            else:
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None
"""


async def test_an_iterative_request_takes_as_many_turns_as_its_model_wants(tmp_path: Path) -> None:
    folder = write_model(
        tmp_path,
        "countdown",
        """backend: "python" max_batch_size: 4 model_transaction_policy { decoupled: true }
        input [{ name: "IN" data_type: TYPE_FP32 dims: [1] }] output [{ name: "OUT" data_type: TYPE_FP32 dims: [1] }]
        sequence_batching { iterative_sequence: true oldest { max_candidate_sequences: 4 }
          control_input [{ name: "START" control [{ kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] }] }] }""",
    )
    (folder / "1" / "model.py").write_text(COUNTDOWN)
    async with serving(tmp_path) as repository:
        requests = [start(repository, "countdown", {"IN": np.float32([[turns]])}) for turns in (3, 1, 2, 0, 4)]
        answers = [
            [response.outputs[0].array.item() for response in await future if response.outputs] for future in requests
        ]
        assert answers == [[3, 2, 1], [1], [2, 1], [], [4, 3, 2, 1]]
        model = repository.model("countdown")
        for _ in range(100):  # the last batch may end just after its answers
            await asyncio.sleep(0.01)
            if not model.statistics.pending:
                break
        assert (model.busy, model.statistics.pending, model.statistics.success.count) == (False, 0, 5)
