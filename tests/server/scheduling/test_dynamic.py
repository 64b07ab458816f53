"""The dynamic batcher: what goes together, who waits, who is refused."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import numpy as np
import pytest

from tests.server.serving import SleepingBackend, identity, infer, row, serving, slow, start, write_model
from trine.server.errors import Code, ServerError
from trine.server.statistics import REJECTED

BUSY = 'dynamic_batching { } parameters { key: "delay_ms" value { string_value: "60" } }'


def instances(count: int = 1) -> str:
    return f"instance_group [{{ kind: KIND_CPU count: {count} }}]"


async def test_what_arrives_while_the_instance_is_busy_is_one_batch(tmp_path: Path) -> None:
    slow(tmp_path, "m", BUSY)
    backend = SleepingBackend()
    async with serving(tmp_path, backend) as repository:
        first = start(repository, "m", {"IN": row(0)})
        await asyncio.sleep(0.02)
        rest = [start(repository, "m", {"IN": row(i)}) for i in range(1, 6)]
        answers = await asyncio.gather(first, *rest)
        assert [values for _, values in backend.batches] == [[0.0], [1.0, 2.0, 3.0, 4.0, 5.0]]
        assert [answer[0].outputs[0].array.item() for answer in answers] == [0, 1, 2, 3, 4, 5]
        statistics = repository.model("m").statistics
        assert (statistics.success.count, statistics.inference_count, statistics.execution_count) == (6, 6, 2)
        assert {rows: batch.compute_infer.count for rows, batch in statistics.batches.items()} == {1: 1, 5: 1}
        assert statistics.queue.ns > 20_000_000  # five waited for most of the first's 60 ms
        assert statistics.pending == 0


async def test_a_batch_is_not_larger_than_allowed_and_rows_count(tmp_path: Path) -> None:
    slow(tmp_path, "m", BUSY, max_batch_size=4)
    backend = SleepingBackend()
    async with serving(tmp_path, backend) as repository:
        sizes = [1, 3, 2, 2, 1]
        first = start(repository, "m", {"IN": row(0)})
        await asyncio.sleep(0.02)
        rest = [
            start(repository, "m", {"IN": np.full((size, 1), number, np.float32)})
            for number, size in enumerate(sizes, 1)
        ]
        await asyncio.gather(first, *rest)
        assert [values for _, values in backend.batches] == [[0.0], [1.0, 2.0], [3.0, 4.0], [5.0]]


async def test_without_dynamic_batching_each_request_is_computed_alone(tmp_path: Path) -> None:
    slow(tmp_path, "m", "")
    backend = SleepingBackend()
    async with serving(tmp_path, backend) as repository:
        await asyncio.gather(*(start(repository, "m", {"IN": row(i)}) for i in range(4)))
        assert [values for _, values in backend.batches] == [[0.0], [1.0], [2.0], [3.0]]


async def test_a_delay_collects_up_to_a_preferred_size(tmp_path: Path) -> None:
    slow(tmp_path, "m", "dynamic_batching { preferred_batch_size: [4] max_queue_delay_microseconds: 100000 }")
    backend = SleepingBackend()
    async with serving(tmp_path, backend) as repository:
        futures = []
        for i in range(6):
            futures.append(start(repository, "m", {"IN": row(i)}))
            await asyncio.sleep(0.002)
        await asyncio.gather(*futures)
        assert [values for _, values in backend.batches] == [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0]]
        why = repository.explain("x")
        assert why == []


async def test_priorities_go_first(tmp_path: Path) -> None:
    slow(
        tmp_path,
        "m",
        """dynamic_batching { priority_levels: 3 default_priority_level: 2 }
        parameters { key: "delay_ms" value { string_value: "50" } }""",
        max_batch_size=2,
    )
    backend = SleepingBackend()
    async with serving(tmp_path, backend) as repository:
        blocker = [start(repository, "m", {"IN": row(0)}), start(repository, "m", {"IN": row(0)})]
        await asyncio.sleep(0.01)
        priorities = {1: 3, 2: 0, 3: 1, 4: 9, 5: 1, 6: 3}
        rest = [start(repository, "m", {"IN": row(i)}, priority=priority) for i, priority in priorities.items()]
        await asyncio.gather(*blocker, *rest)
        order = list(itertools.chain(*(values for _, values in backend.batches[1:])))
        assert order == [3, 5, 2, 4, 1, 6]


async def test_a_full_queue_refuses_and_an_old_request_expires(tmp_path: Path) -> None:
    slow(
        tmp_path,
        "m",
        """dynamic_batching { default_queue_policy {
             max_queue_size: 2 default_timeout_microseconds: 20000 allow_timeout_override: true } }
        parameters { key: "delay_ms" value { string_value: "80" } }""",
    )
    async with serving(tmp_path) as repository:
        first = start(repository, "m", {"IN": row(0)})
        await asyncio.sleep(0.01)
        second = start(repository, "m", {"IN": row(1)})
        third = start(repository, "m", {"IN": row(2)}, timeout_us=1_000_000)  # a client may only shorten it
        with pytest.raises(ServerError, match=r"^\[request id: a\] Exceeds maximum queue size$") as refused:
            start(repository, "m", {"IN": row(3)}, id="a")
        assert refused.value.error_code is Code.UNAVAILABLE
        began = asyncio.get_running_loop().time()
        for future in (second, third):
            with pytest.raises(ServerError, match=r"^Request timeout expired$") as expired:
                await future
            assert expired.value.error_code is Code.UNAVAILABLE
        assert asyncio.get_running_loop().time() - began < 0.06  # at its time, not when the instance is free
        await first
        statistics = repository.model("m").statistics
        assert (statistics.failures[REJECTED], statistics.fail.count, statistics.success.count) == (3, 3, 1)


async def test_an_expired_request_may_be_delayed_instead(tmp_path: Path) -> None:
    slow(
        tmp_path,
        "m",
        """dynamic_batching { default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 150000 } }
        parameters { key: "delay_ms" value { string_value: "300" } }""",
        max_batch_size=1,
    )
    backend = SleepingBackend()
    async with serving(tmp_path, backend) as repository:
        first = start(repository, "m", {"IN": row(0)})
        await asyncio.sleep(0.005)
        old = start(repository, "m", {"IN": row(1)})
        await asyncio.sleep(0.2)
        young = start(repository, "m", {"IN": row(2)})
        await asyncio.gather(first, old, young)
        assert [values for _, values in backend.batches] == [[0.0], [2.0], [1.0]]


async def test_cancelled_requests_are_not_computed(tmp_path: Path) -> None:
    slow(tmp_path, "m", BUSY)
    backend = SleepingBackend()
    async with serving(tmp_path, backend) as repository:
        first = start(repository, "m", {"IN": row(0)})
        await asyncio.sleep(0.01)
        gone, kept = start(repository, "m", {"IN": row(1)}), start(repository, "m", {"IN": row(2)})
        gone.request.cancel()  # type: ignore[attr-defined]
        with pytest.raises(ServerError) as cancelled:
            await gone
        assert cancelled.value.error_code is Code.CANCELLED
        await asyncio.gather(first, kept)
        assert [values for _, values in backend.batches] == [[0.0], [2.0]]
        assert repository.model("m").statistics.failures["CANCELED"] == 1
        assert not repository.model("m").busy


async def test_order_is_preserved_over_several_instances(tmp_path: Path) -> None:
    slow(
        tmp_path,
        "m",
        f"""dynamic_batching {{ preserve_ordering: true }} {instances(3)}
        parameters {{ key: "delay_ms" value {{ string_value: "20" }} }}
        parameters {{ key: "repeat" value {{ string_value: "-1" }} }}""",
        max_batch_size=1,
    )
    async with serving(tmp_path) as repository:
        done: list[float] = []
        futures = []
        for value in (3.0, 1.0, 2.0, 0.5):  # each takes value × 20 ms
            future = start(repository, "m", {"IN": row(value)})
            future.add_done_callback(lambda future: done.append(future.result()[0].outputs[0].array.item()))
            futures.append(future)
        await asyncio.gather(*futures)
        assert done == [3.0, 1.0, 2.0, 0.5]


async def test_instances_compute_side_by_side(tmp_path: Path) -> None:
    slow(tmp_path, "m", instances(3) + ' parameters { key: "delay_ms" value { string_value: "30" } }')
    backend = SleepingBackend()
    async with serving(tmp_path, backend) as repository:
        await asyncio.gather(*(start(repository, "m", {"IN": row(i)}) for i in range(6)))
        assert backend.most_concurrent == 3
        assert {name for name, _ in backend.batches} == {"m:0", "m:1", "m:2"}


async def test_requests_of_different_shapes_do_not_mix(tmp_path: Path) -> None:
    write_model(
        tmp_path,
        "m",
        """backend: "testing" max_batch_size: 8 dynamic_batching { }
        input [{ name: "IN" data_type: TYPE_FP32 dims: [-1] }] output [{ name: "OUT" data_type: TYPE_FP32 dims: [-1] }]
        parameters { key: "delay_ms" value { string_value: "30" } }""",
    )
    backend = SleepingBackend()
    async with serving(tmp_path, backend) as repository:
        first = start(repository, "m", {"IN": row(0)})
        await asyncio.sleep(0.01)
        rest = [start(repository, "m", {"IN": row(*[i] * width)}) for i, width in ((1, 2), (2, 2), (3, 5), (4, 2))]
        answers = await asyncio.gather(first, *rest)
        assert [values for _, values in backend.batches] == [[0.0], [1.0, 2.0], [3.0], [4.0]]
        assert [answer[0].outputs[0].shape for answer in answers] == [(1, 1), (1, 2), (1, 2), (1, 5), (1, 2)]


async def test_a_failing_execution_fails_its_requests_and_no_others(tmp_path: Path) -> None:
    slow(tmp_path, "m", 'dynamic_batching { } parameters { key: "fails" value { string_value: "yes" } }')
    identity(tmp_path)
    async with serving(tmp_path) as repository:
        failing = [start(repository, "m", {"IN": row(i)}) for i in range(3)]
        for future in failing:
            with pytest.raises(ServerError, match="told to fail"):
                await future
        statistics = repository.model("m").statistics
        assert (statistics.failures["BACKEND"], statistics.success.count, statistics.pending) == (3, 0, 0)
        answer = await infer(repository, "identity", {"IN": row(1, 2, 3, 4)})
        assert answer["OUT"].tolist() == [[1, 2, 3, 4]]


async def test_what_is_explained_of_a_request(tmp_path: Path) -> None:
    slow(tmp_path, "m", BUSY)
    async with serving(tmp_path) as repository:
        first = start(repository, "m", {"IN": row(0)}, id="first")
        await asyncio.sleep(0.01)
        await asyncio.gather(first, *(start(repository, "m", {"IN": row(i)}, id=f"r{i}") for i in range(3)))
        async with asyncio.timeout(5):
            while not repository.explain("r1"):  # known once the instance reports its batch done, after the answers
                await asyncio.sleep(0.01)
        explained = repository.explain("r1")
        assert len(explained) == 1
        entry = explained[0]
        assert entry["batch_requests"] == 3
        assert entry["batch_rows"] == 3
        assert entry["model"] == "m"
        assert 20_000 < entry["waited_us"] < 10_000_000  # type: ignore[operator]
        assert repository.explain("first")[0]["batch_requests"] == 1
        with pytest.raises(ServerError):
            start(repository, "m", {"WRONG": row(0)}, id="refused")
        refused = repository.explain("refused")[0]
        assert refused["computed"] is False
        assert "WRONG" in str(refused["error"])
