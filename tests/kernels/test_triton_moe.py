"""A mixture of experts as Triton kernels, against the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from trine.kernels import reference
from trine.kernels import triton as kernels
from trine.kernels.fp8 import Fp8Weight, pack_fp8
from trine.kernels.triton import moe
from trine.kernels.triton.moe_grouped import Tuning
from trine.kernels.triton.moe_route import group, route

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("rows", "hidden", "num_experts", "top_k"),
    [(1, 64, 128, 8), (5, 100, 6, 1), (16, 96, 12, 3), (40, 160, 17, 5), (300, 64, 17, 2)],
)
def test_route(rows: int, hidden: int, num_experts: int, top_k: int, normalize: bool) -> None:
    x, gate = random(rows, hidden), random(num_experts, hidden, seed=1) * 0.2
    for _ in range(2):  # the first launch leaves its counter ready for the second
        weights, chosen = route(x, gate, top_k, normalize)
        expected_weights, expected = reference.route(x, gate, top_k, normalize)
        assert torch.equal(chosen, expected)
        torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize("rows", [1, 20, 300])
def test_nan_chooses_experts_too(rows: int) -> None:
    """A row that overflowed must not read beyond the weights."""
    x = random(rows, 64)
    x[0] = torch.nan
    chosen = route(x, random(17, 64, seed=1), 3, True)[1]
    assert 0 <= int(chosen.min()) <= int(chosen.max()) < 17


@pytest.mark.parametrize("row_block", [1, 16])
@pytest.mark.parametrize(("rows", "num_experts", "top_k"), [(1, 9, 4), (70, 5, 2), (2100, 4, 2), (700, 40, 6)])
def test_groups(rows: int, num_experts: int, top_k: int, row_block: int) -> None:
    if row_block == 1 and rows > 100:
        pytest.skip("thousands of tiles")
    scores = torch.rand(rows, num_experts, generator=torch.Generator().manual_seed(0))
    scores[:, 1] = -1  # an expert that nobody chooses
    chosen = scores.topk(top_k).indices.to(torch.int32)
    for _ in range(2):  # the first launch leaves its counters ready for the second
        groups = group(chosen.to(DEVICE), num_experts, row_block)
    counts = chosen.view(-1).bincount(minlength=num_experts)
    assert chosen.view(-1)[groups.order.cpu().long()].tolist() == chosen.view(-1).sort().values.tolist()
    assert groups.places[groups.order.long()].tolist() == list(range(rows * top_k))
    assert groups.ends.tolist() == counts.cumsum(0).tolist()
    tiles = [
        (expert, int(counts[:expert].sum()) + start)
        for expert in range(num_experts)
        for start in range(0, int(counts[expert]), row_block)
    ]
    count = int(groups.num_tiles)
    assert len(tiles) == count <= groups.tile_experts.shape[0]
    assert list(zip(groups.tile_experts[:count].tolist(), groups.tile_starts[:count].tolist(), strict=True)) == tiles


def mixture(
    rows: int, hidden: int, inner: int, num_experts: int, top_k: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x = random(rows, hidden, dtype=dtype)
    gate_up = random(num_experts, 2 * inner, hidden, dtype=dtype, seed=1) * hidden**-0.5
    down = random(num_experts, hidden, inner, dtype=dtype, seed=2) * inner**-0.5
    weights, chosen = reference.route(x, random(num_experts, hidden, seed=3) * 0.1, top_k, True)
    return x, gate_up, down, weights, chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "hidden", "inner", "num_experts", "top_k"),
    [(1, 64, 48, 8, 3), (1, 96, 128, 5, 1), (2, 64, 40, 7, 7), (21, 100, 60, 4, 2), (150, 64, 128, 2, 1)],
)
def test_experts(rows: int, hidden: int, inner: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
    case = mixture(rows, hidden, inner, num_experts, top_k, dtype)
    assert_near(kernels.experts(*case), reference.experts(*case))


@pytest.mark.parametrize("rows", [1, 30])
def test_float8_experts(rows: int) -> None:
    x, gate_up, down, weights, chosen = mixture(rows, 96, 64, 6, 3, torch.float16)
    eighths = []
    for weight in (gate_up, down):
        flat = pack_fp8(weight.flatten(0, 1))
        eighths.append(Fp8Weight(flat.values.view(weight.shape), flat.scales.view(weight.shape[:2])))
    plain = [(weight.values.float() * weight.scales[:, :, None]).half() for weight in eighths]
    assert_near(kernels.experts(x, *eighths, weights, chosen), reference.experts(x, *plain, weights, chosen))


@pytest.mark.parametrize("resident", [False, True])
def test_plans(resident: bool) -> None:
    """Many rows of few experts, one without any; tiles that end within a block."""
    case = mixture(90, 64, 80, 4, 2, torch.float16)
    case[4].clamp_(max=2)
    plan = moe.Plan(32, Tuning(64, 64, 4, 2), Tuning(32, 32, 4, 2), resident)
    assert_near(moe.experts(*case, plan), reference.experts(*case))


def test_no_rows() -> None:
    x, gate_up, down, weights, chosen = mixture(3, 64, 32, 4, 2, torch.float32)
    assert kernels.experts(x[:0], gate_up, down, weights[:0], chosen[:0]).shape == (0, 64)
    assert route(x[:0], gate_up[0, :4], 2, True)[0].shape == (0, 2)
