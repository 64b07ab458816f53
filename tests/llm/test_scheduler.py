"""The scheduler against its promises, with a fake device: no tensors, thousands of steps."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trine.llm.cache.blocks import BlockPool
from trine.llm.request import SequenceOutput, SequenceRequest
from trine.llm.sampling.params import SamplingParams
from trine.llm.scheduler import Scheduler, SchedulerLimits, Step

EOS = 1


class Device:
    """Computes what a model would, visibly: a cache slot holds the tokens seen so far, the next token is their hash."""

    def __init__(self, limits: SchedulerLimits, num_blocks: int) -> None:
        self.limits = limits
        self.tables: dict[int, list[int]] = {}
        self.slots: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.vocabulary = 50

    def run(self, step: Step) -> list[int]:
        for new in step.new_rows:
            self.tables[new.row] = []
        for row, start, blocks in step.new_blocks:
            table = self.tables[row]
            assert start == len(table), "a block table has a hole"
            table.extend(blocks)
        assert step.num_tokens <= self.limits.max_num_batched_tokens
        assert len(set(step.rows)) == len(step.rows) <= self.limits.max_num_seqs
        size = self.limits.block_size
        inputs = []
        for entry, (row, start, count) in enumerate(zip(step.rows, step.starts, step.counts, strict=True)):
            assert (count == 1) == (entry < step.num_decodes), "decodes come first"
            tokens = step.tokens[entry]
            tokens = [self.last[row]] if tokens is None else tokens
            assert len(tokens) == count
            inputs.append(tokens)
            for position, token in enumerate(tokens, start):  # all writes of a layer come before its reads
                self.slots[self.tables[row][position // size] * size + position % size] = token
        result = []
        for entry in step.sampled:
            row, end = step.rows[entry], step.starts[entry] + step.counts[entry]
            seen = tuple(self.slots[self.tables[row][p // size] * size + p % size] for p in range(end))
            self.last[row] = next_token(seen, self.vocabulary)
            result.append(self.last[row])
        return result


def next_token(seen: tuple[int, ...], vocabulary: int) -> int:
    return random.Random(repr(seen)).randrange(1, vocabulary)


def expected(prompt: list[int], max_tokens: int, vocabulary: int = 50) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(next_token(tuple(tokens), vocabulary))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


def make(num_blocks: int = 40, **overrides: int) -> tuple[Scheduler, Device]:
    values = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "block_size": 4, "max_model_len": 64} | overrides
    limits = SchedulerLimits(**values)  # type: ignore[arg-type]
    return Scheduler(limits, BlockPool(num_blocks), (EOS,)), Device(limits, num_blocks)


def request(sequence_id: int, prompt: list[int], max_tokens: int, **options: object) -> SequenceRequest:
    return SequenceRequest(sequence_id, prompt, SamplingParams(temperature=0), 0, max_tokens, **options)  # type: ignore[arg-type]


def drive(scheduler: Scheduler, device: Device, ahead: int = 0, now: float = 0.0) -> dict[int, list[int]]:
    """Run to the end with `ahead` steps launched before their tokens are read."""
    collected: dict[int, list[int]] = {}
    pending: deque[tuple[Step, list[int]]] = deque()

    def take(outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            collected.setdefault(output.id, []).extend(output.token_ids)

    for _ in range(10_000):
        if not scheduler.has_work and not pending:
            break
        step = scheduler.schedule(now)
        take(scheduler.drain_ended())
        if step is not None:
            pending.append((step, device.run(step)))
        while len(pending) > (ahead if step is not None else 0):
            done, tokens = pending.popleft()
            take(scheduler.update(done, tokens, None, {}))
        scheduler.check()
    else:
        raise AssertionError("the scheduler does not come to an end")
    assert scheduler.pool.num_used == 0
    return collected


@pytest.mark.parametrize("ahead", [0, 1])
def test_one_sequence_decodes_to_its_length(ahead: int) -> None:
    scheduler, device = make()
    scheduler.add(request(7, [5, 6, 7], 9), 0.0)
    assert drive(scheduler, device, ahead) == {7: expected([5, 6, 7], 9)}


@pytest.mark.parametrize("ahead", [0, 1])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_workload_gives_the_tokens_of_each_sequence_alone(ahead: int, data: st.DataObject) -> None:
    """Small pools preempt, small budgets chunk, shared prefixes hit: none of it may show in the tokens."""
    scheduler, device = make(
        num_blocks=data.draw(st.integers(18, 60)),
        max_num_seqs=data.draw(st.integers(1, 8)),
        max_num_batched_tokens=data.draw(st.integers(8, 40)),
    )
    shared = data.draw(st.lists(st.integers(2, 9), max_size=20))
    wanted = {}
    for sequence_id in range(data.draw(st.integers(1, 12))):
        own = data.draw(st.lists(st.integers(2, 9), min_size=1, max_size=20))
        prompt = (shared if data.draw(st.booleans()) else []) + own
        max_tokens = data.draw(st.integers(1, 64 - len(prompt)))
        scheduler.add(request(sequence_id, prompt, max_tokens, priority=data.draw(st.integers(0, 2))), 0.0)
        wanted[sequence_id] = expected(prompt, max_tokens)
    assert drive(scheduler, device, ahead) == wanted


def test_a_shared_prefix_is_computed_once_even_within_a_step() -> None:
    scheduler, device = make(num_blocks=40, max_num_batched_tokens=64)
    prompt = list(range(2, 22))
    for sequence_id in range(4):
        scheduler.add(request(sequence_id, prompt, 3), 0.0)
    step = scheduler.schedule(0.0)
    assert step is not None
    assert sorted(step.counts) == [4, 4, 4, 20]  # the last block is each sequence's own to compute
    scheduler.update(step, device.run(step), None, {})
    assert drive(scheduler, device).keys() == set(range(4))
    assert scheduler.stats.prefix_hit_tokens == 3 * 16


def test_salt_keeps_prefixes_apart() -> None:
    scheduler, device = make(num_blocks=40, max_num_batched_tokens=64)
    for sequence_id, salt in enumerate(["a", "b"]):
        scheduler.add(request(sequence_id, list(range(2, 22)), 1, salt=salt), 0.0)
    drive(scheduler, device)
    assert scheduler.stats.prefix_hit_tokens == 0


def test_a_long_prompt_does_not_stall_decodes() -> None:
    scheduler, device = make(max_num_batched_tokens=8)
    scheduler.add(request(0, [2, 3], 20), 0.0)
    step = scheduler.schedule(0.0)
    assert step is not None
    scheduler.update(step, device.run(step), None, {})
    scheduler.add(request(1, [4] * 40, 2), 0.0)
    for _ in range(5):
        step = scheduler.schedule(0.0)
        assert step is not None
        assert step.counts == [1, 7]
        scheduler.update(step, device.run(step), None, {})


@pytest.mark.parametrize(("prompts", "first_steps"), [(1, [2049, 2049, 2049, 2049, 1]), (4, [8192, 8192, 8192, 2049])])
def test_prompts_that_do_not_pile_up_take_a_part_of_a_step(prompts: int, first_steps: list[int]) -> None:
    scheduler, device = make(
        max_num_batched_tokens=8192, block_size=64, num_blocks=600, max_model_len=8320, max_num_seqs=4
    )
    scheduler.add(request(0, [2, 3], 100), 0.0)
    step = scheduler.schedule(0.0)
    assert step is not None
    scheduler.update(step, device.run(step), None, {})
    for sequence_id in range(1, prompts + 1):
        scheduler.add(request(sequence_id, [3 + sequence_id] * 8192, 1), 0.0)
    sizes = []
    for _ in first_steps:
        step = scheduler.schedule(0.0)
        assert step is not None
        sizes.append(step.num_tokens)
        scheduler.update(step, device.run(step), None, {})
    assert sizes == first_steps


def test_priority_goes_first_and_preempts_last() -> None:
    scheduler, device = make(max_num_seqs=1, num_blocks=30)
    order = []
    for sequence_id, priority in enumerate([5, 0, 2]):
        scheduler.add(request(sequence_id, [2, 3, sequence_id], 2, priority=priority), 0.0)
    while scheduler.has_work:
        step = scheduler.schedule(0.0)
        assert step is not None
        outputs = scheduler.update(step, device.run(step), None, {})
        order += [output.id for output in outputs if output.finish_reason]
    assert order == [1, 2, 0]


@pytest.mark.parametrize("ahead", [0, 1])
def test_abort_frees_blocks_at_once(ahead: int) -> None:
    scheduler, device = make()
    scheduler.add(request(0, [2] * 12, 50), 0.0)
    step = scheduler.schedule(0.0)
    assert step is not None
    scheduler.abort(0)
    assert scheduler.pool.num_used == 0
    assert [output.finish_reason for output in scheduler.drain_ended()] == ["abort"]
    assert scheduler.update(step, device.run(step), None, {}) == []
    assert not scheduler.has_work
    scheduler.check()
    scheduler.abort(0)  # twice is harmless


def test_abort_while_waiting() -> None:
    scheduler, device = make(max_num_seqs=1)
    scheduler.add(request(0, [2, 3], 4), 0.0)
    scheduler.add(request(1, [2, 3], 4), 0.0)
    scheduler.abort(1)
    assert drive(scheduler, device) == {0: expected([2, 3], 4), 1: []}


def test_deadline_ends_waiting_and_running_sequences() -> None:
    scheduler, device = make(max_num_seqs=1)
    scheduler.add(request(0, [2, 3], 30, time_limit=5.0), 0.0)
    scheduler.add(request(1, [2, 3], 30, time_limit=5.0), 0.0)
    step = scheduler.schedule(1.0)
    assert step is not None
    scheduler.update(step, device.run(step), None, {})
    assert scheduler.schedule(6.0) is None
    assert {(output.id, output.finish_reason) for output in scheduler.drain_ended()} == {
        (0, "deadline"),
        (1, "deadline"),
    }
    assert scheduler.pool.num_used == 0


def test_preemption_resumes_and_is_counted() -> None:
    scheduler, device = make(num_blocks=17, max_num_seqs=4, max_num_batched_tokens=32)
    wanted = {}
    for sequence_id in range(4):
        prompt = [2 + sequence_id] * 10
        scheduler.add(request(sequence_id, prompt, 40), 0.0)
        wanted[sequence_id] = expected(prompt, 40)
    assert drive(scheduler, device, ahead=1) == wanted
    assert scheduler.stats.preemptions > 0


def test_the_last_token_of_a_budget_is_not_computed_twice() -> None:
    """A sequence whose max_tokens are all launched is left alone until they come back."""
    scheduler, device = make()
    scheduler.add(request(0, [2, 3], 1), 0.0)
    step = scheduler.schedule(0.0)
    assert step is not None
    assert scheduler.schedule(0.0) is None
    outputs = scheduler.update(step, device.run(step), None, {})
    assert outputs[0].finish_reason in ("length", "stop")


def test_prompt_scores_need_every_prompt_position_computed() -> None:
    scheduler, device = make(max_num_batched_tokens=8)
    prompt = list(range(2, 22))
    scheduler.add(request(0, prompt, 1), 0.0)
    drive(scheduler, device)
    scored = SequenceRequest(1, prompt, SamplingParams(temperature=0, prompt_logprobs=0), 0, 1)
    scheduler.add(scored, 0.0)
    targets: list[int] = []
    while (step := scheduler.schedule(0.0)) is not None:
        for entry_targets in step.prompt_targets.values():
            targets += entry_targets
        scheduler.update(step, device.run(step), None, {})
    assert targets == prompt[1:]


def test_nan_ends_the_sequence_with_an_error() -> None:
    scheduler, _ = make()
    scheduler.add(request(0, [2, 3], 5), 0.0)
    step = scheduler.schedule(0.0)
    assert step is not None
    (output,) = scheduler.update(step, [-1], None, {})
    assert output.finish_reason == "error"
    assert output.error is not None
    assert "NaN" in output.error
    (block,) = step.new_blocks[0].block_ids
    scheduler.add(request(1, [2, 3], 5), 0.0)
    step = scheduler.schedule(0.0)
    assert step is not None
    assert step.spoiled_blocks == [block]
