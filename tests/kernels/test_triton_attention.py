"""Paged attention kernels against the reference, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.paged import PagedCase, paged_case
from trine.kernels import reference
from trine.kernels.triton import paged_attention, supports
from trine.kernels.triton.decode_attention import DecodeTuning, decode_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def check(case: PagedCase, sliding_window: int | None = None) -> torch.Tensor:
    scale = case.q.shape[2] ** -0.5
    expected = reference.paged_attention(case.q, case.k_cache, case.v_cache, case.batch, scale, sliding_window)
    actual = paged_attention(case.q, case.k_cache, case.v_cache, case.batch, scale, sliding_window)
    assert actual.dtype == case.q.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[case.q.dtype])
    return actual


SHAPES = [(32, 3, 3), (64, 4, 1), (80, 6, 2), (96, 7, 1), (128, 4, 2), (256, 2, 2)]


@pytest.mark.parametrize(("head_dim", "num_heads", "num_kv_heads"), SHAPES)
def test_decode_shapes(head_dim: int, num_heads: int, num_kv_heads: int) -> None:
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    check(paged_case([1, 17, 64, 150], [1] * 4, **shape, device=DEVICE))


def test_decode_of_more_pieces_than_may_be() -> None:
    """Past max_pieces * min_piece positions the pieces grow instead of becoming more."""
    check(paged_case([2200, 2049, 2048, 65], [1] * 4, num_heads=2, num_kv_heads=1, head_dim=32, device=DEVICE))


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("window", [1, 50, 1000])
def test_decode_window(block_size: int, window: int) -> None:
    case = paged_case(
        [1, 49, 50, 51, 300], [1] * 5, num_heads=4, num_kv_heads=2, head_dim=32, block_size=block_size, device=DEVICE
    )
    check(case, window)


@pytest.mark.parametrize(("head_dim", "num_heads", "num_kv_heads"), SHAPES)
def test_prefill_shapes(head_dim: int, num_heads: int, num_kv_heads: int) -> None:
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    check(paged_case([2, 33, 70], [2, 33, 70], **shape, device=DEVICE))


@pytest.mark.parametrize("window", [None, 1, 20, 40])
def test_mixed_steps_with_prefixes(window: int | None) -> None:
    """Decode rows, chunks that continue a prompt, and whole prompts in one step."""
    case = paged_case([40, 5, 100, 47, 16], [1, 1, 30, 47, 2], num_heads=4, num_kv_heads=2, head_dim=32, device=DEVICE)
    check(case, window)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as if they were integers")
    case = paged_case([90, 30, 70], [1, 1, 65], num_heads=4, num_kv_heads=2, head_dim=64, dtype=dtype, device=DEVICE)
    if DEVICE == "cuda":  # Hopper's kernels fetch whole blocks: values past a sequence's end must be finite
        case.v_cache.nan_to_num_()
    check(case)


def rows_of(case: PagedCase, sequences: list[int]) -> tuple[PagedCase, torch.Tensor]:
    """The same sequences alone, and the rows of `case` that they are."""
    starts = case.batch.query_start.tolist()
    rows = torch.cat([torch.arange(starts[s], starts[s + 1]) for s in sequences]).to(DEVICE)
    lengths = torch.tensor([0] + [starts[s + 1] - starts[s] for s in sequences])
    index = torch.tensor(sequences, device=DEVICE)
    batch = type(case.batch)(
        positions=case.batch.positions[rows],
        slots=case.batch.slots[rows],
        query_start=lengths.cumsum(0).to(torch.int32).to(DEVICE),
        seq_lens=case.batch.seq_lens[index],
        block_table=case.batch.block_table[index],
        num_decodes=int((lengths == 1).sum()),
        max_query_len=int(lengths.max()),
        max_seq_len=int(case.batch.seq_lens[index].max()),
    )
    return PagedCase(case.q[rows], case.k_cache, case.v_cache, batch), rows


@pytest.mark.parametrize("window", [None, 100])
def test_rows_do_not_depend_on_their_neighbours(window: int | None) -> None:
    case = paged_case(
        [300, 20, 129, 100, 40], [1, 1, 1, 60, 5], num_heads=4, num_kv_heads=2, head_dim=32, device=DEVICE
    )
    together = check(case, window)
    for sequences in ([0], [1, 3], [2, 4]):
        alone, rows = rows_of(case, sequences)
        assert torch.equal(check(alone, window), together[rows])


def test_chunks_equal_the_whole_prompt() -> None:
    """Bit for bit on a GPU; the interpreter's matrix products round by a row's place in the tile."""
    case = paged_case([150], [150], num_heads=4, num_kv_heads=2, head_dim=32, device=DEVICE)
    whole = check(case)
    parts = []
    for start, stop in ((0, 37), (37, 101), (101, 150)):
        batch = type(case.batch)(
            positions=case.batch.positions[start:stop],
            slots=case.batch.slots[start:stop],
            query_start=torch.tensor([0, stop - start], dtype=torch.int32, device=DEVICE),
            seq_lens=torch.tensor([stop], dtype=torch.int32, device=DEVICE),
            block_table=case.batch.block_table,
            num_decodes=0,
            max_query_len=stop - start,
            max_seq_len=stop,
        )
        parts.append(check(PagedCase(case.q[start:stop], case.k_cache, case.v_cache, batch)))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0 if DEVICE == "cuda" else 1e-6)


def test_counters_are_ready_for_the_next_launch() -> None:
    case = paged_case([200, 130], [1, 1], num_heads=2, num_kv_heads=2, head_dim=32, device=DEVICE)
    first = check(case)
    assert torch.equal(check(case), first)


@pytest.mark.parametrize("window", [None, 500])
def test_spreading_pieces_changes_no_bit(window: int | None) -> None:
    case = paged_case([650, 129, 128, 40], [1] * 4, num_heads=2, num_kv_heads=1, head_dim=32, device=DEVICE)
    results = []
    for programs_per_sm in (0, 1, 100):  # one program for all pieces, a few, one a piece
        out = torch.empty(4, 64, device=DEVICE)
        tuning = DecodeTuning(programs_per_sm=programs_per_sm)
        decode_attention(case.q, case.k_cache, case.v_cache, case.batch, 0.2, window, out, tuning)
        results.append(out)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("tuning", [DecodeTuning(kv_block=32, min_piece=128), DecodeTuning(max_pieces=4, num_warps=8)])
def test_decode_tuning_is_free(tuning: DecodeTuning) -> None:
    case = paged_case([300, 90], [1, 1], num_heads=4, num_kv_heads=2, head_dim=64, device=DEVICE)
    expected = reference.paged_attention(case.q, case.k_cache, case.v_cache, case.batch, 0.125, None)
    actual = torch.full_like(expected, torch.nan)
    decode_attention(case.q, case.k_cache, case.v_cache, case.batch, 0.125, None, actual, tuning)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


def test_supports_says_why_not() -> None:
    assert supports(32, 8, 128, torch.bfloat16) == []
    reasons = supports(7, 2, 512, torch.float64)
    assert len(reasons) == 3
    assert "head_dim 512" in reasons[1]
