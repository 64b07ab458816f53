"""What a captured graph reads after staging: the step's rows, then padding."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.paged import paged_case
from trine.kernels.triton.staging import stage_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_rows_are_copied_and_the_rest_padded() -> None:
    rows, size, columns = 3, 8, 1500
    batch = paged_case(
        [20, 5, 33], [1] * 3, num_heads=1, num_kv_heads=1, head_dim=4, device=DEVICE, spare_columns=1100
    ).batch
    token_ids = torch.tensor([7, 8, 9], device=DEVICE)
    to_token_ids = torch.full((size,), -1, device=DEVICE)
    to_batch = dataclasses.replace(
        batch,
        positions=torch.full((size,), -1, device=DEVICE),
        slots=torch.full((size,), -1, device=DEVICE),
        seq_lens=torch.full((size,), -1, dtype=torch.int32, device=DEVICE),
        block_table=torch.full((size, columns), -1, dtype=torch.int32, device=DEVICE),
    )
    stage_decode(token_ids, batch, to_token_ids, to_batch)
    width = batch.block_table.shape[1]
    assert to_token_ids.tolist() == [7, 8, 9] + [0] * 5
    assert to_batch.seq_lens.tolist() == [20, 5, 33] + [1] * 5
    for actual, expected in ((to_batch.positions, batch.positions), (to_batch.slots, batch.slots)):
        assert actual.tolist() == expected.tolist() + [0] * 5
    assert torch.equal(to_batch.block_table[:rows, :width], batch.block_table)
    assert not to_batch.block_table[rows:, :width].any()
    assert (to_batch.block_table[:, width:] == -1).all()


def test_wider_tables_are_refused() -> None:
    batch = paged_case([20], [1], num_heads=1, num_kv_heads=1, head_dim=4, device=DEVICE).batch
    narrow = dataclasses.replace(batch, block_table=batch.block_table[:, :1])
    with pytest.raises(ValueError, match="columns"):
        stage_decode(torch.tensor([1], device=DEVICE), batch, torch.tensor([0], device=DEVICE), narrow)
