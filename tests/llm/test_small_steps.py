"""Small steps on their way to a graph: what is sent of the rows' block tables, and when; what padding leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests.llm.models.checkpoints import Case, build
from tests.llm.test_parity_engine import CASES, assert_greedy, mixed_prompts
from trine import LLM
from trine.llm import graphs, small_steps
from trine.llm.graphs import Size, StepGraphs, token_sizes
from trine.llm.request import SequenceRequest
from trine.llm.sampling.params import SamplingParams
from trine.llm.scheduler import NewBlocks, NewRow, Step
from trine.llm.small_steps import SmallSteps
from trine.llm.worker import Worker


def test_large_models_gain_with_few_tokens() -> None:
    assert token_sizes(15_000_000) == list(graphs.TOKENS)
    assert token_sizes(218_000_000)[-1] == 1024
    assert token_sizes(109_000_000)[-1] == 2048
    assert token_sizes(856_000_000)[-1] == 256
    assert token_sizes(10**11) == [32, 64, 128]


class PlainRing:
    """In place of pinned buffers and events, which need a GPU."""

    def __init__(self, size: int) -> None:
        self.array = np.zeros(size, dtype=np.int32)

    def next(self) -> np.ndarray:
        return self.array

    def copy_to(self, target: torch.Tensor, count: int) -> None:
        target[:count] = torch.from_numpy(self.array[:count])


class Recorder(StepGraphs):
    """Graphs that only remember what they were given."""

    def run(self, size, header, entries, prompts, greedy):  # type: ignore[no-untyped-def]
        self.size_run, self.header, self.entries, self.prompts = size, list(header), entries.tolist(), prompts.tolist()
        for row, length, _, block in self.entries:  # as the kernel does
            if block:
                self._table[row, (length - 1) // 16] = block
        return torch.zeros(len(entries))


@pytest.fixture
def host_table() -> np.ndarray:
    return np.zeros((6, 10), dtype=np.int32)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, host_table: np.ndarray) -> SmallSteps:
    monkeypatch.setattr(graphs, "PinnedRing", PlainRing)
    monkeypatch.setattr(small_steps, "StepGraphs", Recorder)
    model = SimpleNamespace(layer_work=218_000_000)  # Llama-3.1-8B
    return SmallSteps(model, torch.zeros(7), host_table, 16)  # type: ignore[arg-type]


def plan(host_table: np.ndarray, rows: list[int], starts: list[int], new_blocks: list[NewBlocks]) -> Step:
    """A step of one unknown token a row, its blocks in the host's table as the worker leaves them."""
    for row, start, blocks in new_blocks:
        host_table[row, start : start + len(blocks)] = blocks
    count = len(rows)
    return Step(rows=rows, starts=starts, counts=[1] * count, tokens=[None] * count, num_decodes=count,
                sampled=list(range(count)), new_blocks=new_blocks)  # fmt: skip


def test_a_new_block_travels_with_its_entry_and_a_prompts_blocks_before(
    steps: SmallSteps, host_table: np.ndarray
) -> None:
    recorder = steps._graphs
    missed = plan(host_table, [3, 5], [0, 0], [NewBlocks(3, 0, [11, 12]), NewBlocks(5, 0, [13])])
    missed.sampled = [0]
    assert steps.run(missed, greedy=True) is None
    steps.run(plan(host_table, [3], [31], []), greedy=True)
    assert recorder.entries == [[3, 32, -1, 0]]
    assert recorder.header == [1, 0, 0, 2, 1]
    assert recorder._table[3, :2].tolist() == [11, 12]
    steps.run(plan(host_table, [3, 5], [32, 16], [NewBlocks(3, 2, [14]), NewBlocks(5, 1, [15])]), greedy=True)
    assert recorder.entries == [[3, 33, -1, 14], [5, 17, -1, 0]]  # row 5's blocks were still to come: all at once
    assert np.array_equal(recorder._table.numpy()[[3, 5], :3], host_table[[3, 5], :3])


def test_a_row_that_changes_hands_sends_its_whole_table(steps: SmallSteps, host_table: np.ndarray) -> None:
    steps.run(plan(host_table, [2], [0], [NewBlocks(2, 0, [7])]), greedy=True)
    steps.run(plan(host_table, [2], [0], [NewBlocks(2, 0, [9])]), greedy=False)
    assert steps._graphs.entries == [[2, 1, -1, 0]]
    assert steps._graphs._table[2, 0] == 9


def test_known_tokens_are_sent(steps: SmallSteps, host_table: np.ndarray) -> None:
    step = plan(host_table, [1, 4], [5, 6], [])
    step.tokens = [[42], None]
    steps.run(step, greedy=True)
    assert steps._graphs.entries == [[1, 6, 42, 0], [4, 7, -1, 0]]


def test_prompts_follow_with_their_tokens(steps: SmallSteps, host_table: np.ndarray) -> None:
    news = [NewBlocks(0, 2, [21]), NewBlocks(1, 1, [22]), NewBlocks(4, 0, [23, 24])]
    step = plan(host_table, [0, 1, 4], [32, 16, 0], news)
    step.counts, step.num_decodes = [1, 3, 20], 1
    step.tokens = [None, [7, 8, 9], list(range(20))]
    steps.run(step, greedy=True)
    recorder = steps._graphs
    assert recorder.size_run == Size(8, 32)
    assert recorder.header == [1, 2, 23, 3, 8 + 23]
    assert recorder.entries == [[0, 33, -1, 21], [1, 19, 0, 0], [4, 20, 3, 0]]
    assert recorder.prompts == [7, 8, 9, *range(20), *[0, 22, 0], *[23, 24, 0]]
    assert not steps._stale


def test_which_steps_are_for_graphs(steps: SmallSteps, host_table: np.ndarray) -> None:
    def size(rows: int, prompts: tuple[int, ...] = (), settled: bool = True) -> Size | None:
        return steps._graphs.size(rows, len(prompts), sum(prompts), settled)

    assert size(2) == Size(2)
    assert size(6) == Size(8)
    assert size(9) is None  # the engine has no rows for it
    assert size(2, settled=False) == Size(8, 32)  # a newcomer may read what its own step writes
    assert size(0, (32,)) == Size(0, 32)
    assert size(0, (33,)) == Size(0, 64)
    assert size(0, (2,) * 7) == Size(0, 32)
    assert size(0, (2,) * 8) == Size(0, 384)  # the last of a size's prompts pads
    assert size(1, (1024,)) is None
    step = plan(host_table, [1, 2], [16, 16], [])
    assert steps._size(step) == Size(2)
    step.new_rows = [NewRow(2, SequenceRequest(7, [1] * 17, SamplingParams(), 0, 8), [])]
    assert steps._size(step) == Size(8, 32)
    step.sampled = [0]
    assert steps._size(step) is None


class Recomputed:
    """In place of a recorded graph: computes again, into the same tensor."""

    def __init__(self, compute: Callable[[], torch.Tensor], result: torch.Tensor) -> None:
        self.compute, self.result = compute, result

    def replay(self) -> None:
        self.result.copy_(self.compute())


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[4]], ids=str)
def test_tokens_of_padded_steps_equal_transformers(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine on a CPU with small steps padded as for graphs: prompts alone, several, and beside decodes."""
    sizes = set()

    def capture(self, size, greedy, short):  # type: ignore[no-untyped-def]
        assert not greedy  # that kernel has many programs, which Triton's interpreter runs one by one
        sizes.add(size)
        result = torch.zeros(size.sequences, self.model.config.hidden_size)
        return Recomputed(partial(self._compute, size, greedy, short), result), result

    def small_steps_of(worker: Worker) -> SmallSteps:
        return SmallSteps(worker.model, worker.last_token, worker._block_table, worker.limits.block_size)

    monkeypatch.setattr(graphs, "PinnedRing", PlainRing)
    monkeypatch.setattr(StepGraphs, "_capture", capture)
    monkeypatch.setattr(Worker, "_graphs", small_steps_of)
    theirs = build(case, tmp_path)
    prompts = mixed_prompts()[1::2]
    prompts += [prompts[4][:32], prompts[4][:33]]  # the second shares two blocks: one token is left to compute
    params = [SamplingParams(temperature=0, max_tokens=2 + i, ignore_eos=True, logprobs=0) for i in range(len(prompts))]
    with LLM(tmp_path, dtype="float32", max_num_batched_tokens=512, max_num_seqs=4, cache_bytes=64 << 20) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        llm.check()
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_greedy(theirs, prompt, output.outputs[0].token_ids)
    assert {bool(size.decodes) for size in sizes if size.tokens} == {False, True}
    assert any(not size.tokens for size in sizes)
