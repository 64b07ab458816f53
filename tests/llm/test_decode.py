"""Decode steps on their way to a graph: what is sent of the rows' block tables, and when."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from trine.llm import decode
from trine.llm.decode import DecodeSteps
from trine.llm.request import SequenceRequest
from trine.llm.sampling.params import SamplingParams
from trine.llm.scheduler import NewBlocks, NewRow, Step


class Recorder:
    """In place of the graphs: remembers what it was given."""

    def __init__(self, model: object, last_token: torch.Tensor, table: torch.Tensor, block_size: int) -> None:
        self.table = table

    def can_run(self, num_rows: int) -> bool:
        return num_rows <= 4

    def run(self, entries: np.ndarray, width: int, greedy: bool) -> torch.Tensor:
        self.entries, self.width = entries.tolist(), width
        for row, length, _, block in self.entries:  # as the kernel does
            if block:
                self.table[row, (length - 1) // 16] = block
        return torch.zeros(len(entries))


@pytest.fixture
def host_table() -> np.ndarray:
    return np.zeros((6, 10), dtype=np.int32)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, host_table: np.ndarray) -> DecodeSteps:
    monkeypatch.setattr(decode, "DecodeGraphs", Recorder)
    return DecodeSteps(None, torch.zeros(7), host_table, 16)  # type: ignore[arg-type]


def plan(host_table: np.ndarray, rows: list[int], starts: list[int], new_blocks: list[NewBlocks]) -> Step:
    """A step of one unknown token a row, its blocks in the host's table as the worker leaves them."""
    for row, start, blocks in new_blocks:
        host_table[row, start : start + len(blocks)] = blocks
    count = len(rows)
    return Step(rows=rows, starts=starts, counts=[1] * count, tokens=[None] * count, num_decodes=count,
                sampled=list(range(count)), new_blocks=new_blocks)  # fmt: skip


def test_a_new_block_travels_with_its_entry_and_a_prompts_blocks_before(
    steps: DecodeSteps, host_table: np.ndarray
) -> None:
    recorder = steps._graphs
    steps.missed(plan(host_table, [3, 5], [0, 0], [NewBlocks(3, 0, [11, 12]), NewBlocks(5, 0, [13])]))
    steps.run(plan(host_table, [3], [31], []), greedy=True)
    assert recorder.entries == [[3, 32, -1, 0]]
    assert recorder.width == 2
    assert recorder.table[3, :2].tolist() == [11, 12]
    steps.run(plan(host_table, [3, 5], [32, 16], [NewBlocks(3, 2, [14]), NewBlocks(5, 1, [15])]), greedy=True)
    assert recorder.entries == [[3, 33, -1, 14], [5, 17, -1, 0]]  # row 5's blocks were still to come: all at once
    assert np.array_equal(recorder.table.numpy()[[3, 5], :3], host_table[[3, 5], :3])


def test_a_row_that_changes_hands_sends_its_whole_table(steps: DecodeSteps, host_table: np.ndarray) -> None:
    steps.run(plan(host_table, [2], [0], [NewBlocks(2, 0, [7])]), greedy=True)
    steps.run(plan(host_table, [2], [0], [NewBlocks(2, 0, [9])]), greedy=False)
    assert steps._graphs.entries == [[2, 1, -1, 0]]
    assert steps._graphs.table[2, 0] == 9


def test_known_tokens_are_sent(steps: DecodeSteps, host_table: np.ndarray) -> None:
    step = plan(host_table, [1, 4], [5, 6], [])
    step.tokens = [[42], None]
    steps.run(step, greedy=True)
    assert steps._graphs.entries == [[1, 6, 42, 0], [4, 7, -1, 0]]


def test_other_steps_are_not_for_graphs(steps: DecodeSteps, host_table: np.ndarray) -> None:
    assert steps.can_run(plan(host_table, [0, 1], [3, 4], []))
    assert not steps.can_run(plan(host_table, list(range(5)), [3] * 5, []))
    prefill = plan(host_table, [0, 1], [3, 4], [])
    prefill.num_decodes = 1
    assert not steps.can_run(prefill)
    unfinished = plan(host_table, [0, 1], [3, 4], [])
    unfinished.sampled = [0]
    assert not steps.can_run(unfinished)


def test_a_newcomer_may_read_what_its_own_step_writes(steps: DecodeSteps, host_table: np.ndarray) -> None:
    step = plan(host_table, [1, 2], [16, 16], [])
    assert steps.can_run(step)
    step.new_rows = [NewRow(2, SequenceRequest(7, [1] * 17, SamplingParams(), 0, 8), [])]
    assert not steps.can_run(step)
