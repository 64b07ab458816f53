"""What a decode step's model reads after staging: the rows' state, the step's news, then padding."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.paged import paged_case
from trine.kernels.triton.staging import stage_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_SIZE = 16


def test_entries_are_gathered_from_their_rows_and_the_rest_padded() -> None:
    size, rows, columns = 6, 8, 1500
    case = paged_case(
        [1] * size, [1] * size, num_heads=1, num_kv_heads=1, head_dim=4, spare_columns=1499, device=DEVICE
    )
    batch = case.batch
    last_token = torch.arange(100, 100 + rows + 1, device=DEVICE)
    table = torch.randint(1, 1000, (rows, columns), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    before = table.clone()
    entries = [(5, 20, -1, 0), (0, 33, -1, 777), (7, 17000, 42, 0)]  # the second has a new block for position 32
    width = -(-17000 // BLOCK_SIZE)
    step = torch.tensor([len(entries), width, *(number for entry in entries for number in entry), 9, 9, 9, 9])
    token_ids, to_rows = (torch.full((size,), -1, device=DEVICE) for _ in range(2))
    old_table = batch.block_table.clone()
    table = table.to(DEVICE)
    stage_decode(step.to(torch.int32).to(DEVICE), last_token, table, BLOCK_SIZE, token_ids, to_rows, batch)

    before[0, 2] = 777
    assert torch.equal(table.cpu(), before)
    assert token_ids.tolist() == [105, 100, 42, 0, 0, 0]
    assert to_rows.tolist() == [5, 0, 7, rows, rows, rows]
    assert batch.seq_lens.tolist() == [20, 33, 17000, 1, 1, 1]
    assert batch.positions.tolist() == [19, 32, 16999, 0, 0, 0]
    slots = [int(before[row, (n - 1) // BLOCK_SIZE]) * BLOCK_SIZE + (n - 1) % BLOCK_SIZE for row, n, _, _ in entries]
    assert batch.slots.tolist() == [*slots, 0, 0, 0]
    staged = batch.block_table.cpu()
    assert torch.equal(staged[:3, :width], before[[5, 0, 7], :width])
    assert staged[3:, 0].tolist() == [0, 0, 0]
    assert torch.equal(staged[:3, width:], old_table.cpu()[:3, width:])
