"""What a small step's model reads after staging: the rows' state, the step's news, then padding."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from trine.kernels.triton.staging import stage
from trine.llm.batch import Batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_SIZE = 16
ROWS, COLUMNS = 8, 1500


def empty_batch(num_decodes: int, num_tokens: int, sequences: int) -> Batch:
    """Nothing in it but what was there before: -1, and block 3."""

    def full(*shape: int, value: int = -1, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=DEVICE)

    query_start = full(sequences + 1, dtype=torch.int32)
    query_start[0] = 0
    return Batch(
        positions=full(num_tokens),
        slots=full(num_tokens),
        query_start=query_start,
        seq_lens=full(sequences, dtype=torch.int32),
        block_table=full(sequences, COLUMNS, value=3, dtype=torch.int32),
        num_decodes=num_decodes,
        max_query_len=num_tokens,
        max_seq_len=COLUMNS * BLOCK_SIZE,
    )


def run(
    batch: Batch, table: torch.Tensor, entries: list[tuple[int, int, int, int]], num_decodes: int, tokens: list[int]
) -> tuple[list[int], list[int], list[int]]:
    """Token ids, rows and output rows of the staged step."""
    width = max(-(-length // BLOCK_SIZE) for _, length, _, _ in entries)
    numbers = [num_decodes, len(entries) - num_decodes, len(tokens), width, 9]
    numbers += [number for entry in entries for number in entry] + tokens
    for row, *_ in entries[num_decodes:]:
        numbers += table[row, :width].tolist()
        table[row] = 0  # as for a row that has just changed hands
    numbers += [9, 9, 9, 9]
    last_token = torch.arange(100, 100 + ROWS + 1, device=DEVICE)
    sequences = len(batch.seq_lens)
    outs = [torch.full((n,), -1, device=DEVICE) for n in (len(batch.positions), sequences, sequences)]
    step = torch.tensor(numbers, dtype=torch.int32, device=DEVICE)
    stage(step, last_token, table, BLOCK_SIZE, outs[0], batch, *outs[1:])
    token_ids, rows, output_rows = (out.tolist() for out in outs)
    return token_ids, rows, output_rows


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randint(1, 1000, (ROWS, COLUMNS), dtype=torch.int32, generator=torch.Generator().manual_seed(0))


def slots_of(row: torch.Tensor, positions: range) -> list[int]:
    return [int(row[position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE for position in positions]


def test_decodes_are_gathered_from_their_rows_and_the_rest_padded(table: torch.Tensor) -> None:
    before = table.clone()
    entries = [(5, 20, -1, 0), (0, 33, -1, 777), (7, 17000, 42, 0)]  # the second has a new block for position 32
    batch, table = empty_batch(6, 6, 6), table.to(DEVICE)
    token_ids, rows, output_rows = run(batch, table, entries, 3, [])

    before[0, 2] = 777
    assert torch.equal(table.cpu(), before)
    assert token_ids == [105, 100, 42, 0, 0, 0]
    assert rows == [5, 0, 7, ROWS, ROWS, ROWS]
    assert output_rows == [0, 1, 2, 3, 4, 5]
    assert batch.query_start.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert batch.seq_lens.tolist() == [20, 33, 17000, 1, 1, 1]
    assert batch.positions.tolist() == [19, 32, 16999, 0, 0, 0]
    slots = [slots_of(before[row], range(length - 1, length))[0] for row, length, _, _ in entries]
    assert batch.slots.tolist() == [*slots, 0, 0, 0]
    staged, width = batch.block_table.cpu(), -(-17000 // BLOCK_SIZE)
    assert torch.equal(staged[:3, :width], before[[5, 0, 7], :width])
    assert staged[3:, 0].tolist() == [0, 0, 0]
    assert (staged[:3, width:] == 3).all()


def test_prompts_follow_the_decodes_and_the_last_sequence_takes_what_is_left(table: torch.Tensor) -> None:
    before = table.clone()
    entries = [(5, 20, -1, 0), (1, 40, 0, 0), (6, 2, 5, 0)]  # the second has computed 35 tokens before
    batch, table = empty_batch(2, 30, 6), table.to(DEVICE)
    token_ids, rows, output_rows = run(batch, table, entries, 1, [11, 12, 13, 14, 15, 21, 22])

    after = before.clone()
    after[[1, 6], 3:] = 0
    assert torch.equal(table.cpu(), after)
    assert token_ids == [105, 0, 11, 12, 13, 14, 15, 21, 22, *[0] * 21]
    assert rows == [5, 1, 6, ROWS, ROWS, ROWS]
    assert output_rows[:3] == [0, 6, 8]
    assert set(output_rows[3:]) == {0, 1}  # any token will do
    assert batch.query_start.tolist() == [0, 1, 2, 7, 9, 9, 30]
    assert batch.seq_lens.tolist() == [20, 1, 40, 2, 0, 21]
    assert batch.positions.tolist() == [19, 0, *range(35, 40), 0, 1, *[0] * 21]
    real = [*slots_of(before[5], range(19, 20)), 0, *slots_of(before[1], range(35, 40)), *slots_of(before[6], range(2))]
    assert batch.slots.tolist() == [*real, *range(16), *range(5)]
    staged = batch.block_table.cpu()
    assert torch.equal(staged[[0, 2, 3], :3], before[[5, 1, 6], :3])
    assert staged[1, 0] == 0
    assert staged[5, :2].tolist() == [0, 0]
    assert (staged[:, 3:] == 3).all()


def test_a_step_that_fills_its_size_has_nothing_to_pad(table: torch.Tensor) -> None:
    batch = empty_batch(0, 4, 2)
    token_ids, rows, output_rows = run(batch, table.to(DEVICE), [(2, 4, 0, 0)], 0, [7, 8, 9, 10])
    assert token_ids == [7, 8, 9, 10]
    assert rows == [2, ROWS]
    assert output_rows[0] == 3
    assert batch.query_start.tolist() == [0, 4, 4]
    assert batch.seq_lens.tolist() == [4, 0]
