"""A mixture of experts as Triton kernels, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from trine.kernels import reference
from trine.kernels.fp8 import Fp8Weight, pack_fp8
from trine.kernels.triton import moe
from trine.kernels.triton.moe_grouped import Tuning
from trine.kernels.triton.moe_route import Lists, group, route
from trine.kernels.types import AddNorm, Mixture

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
    """Weights, choices, and the lists of each expert's choices."""
    x, gate = random(rows, hidden), random(num_experts, hidden, seed=1) * 0.2
    for _ in range(2):  # the first launch leaves its counter ready for the second
        lists = Lists.empty(rows, num_experts, x.device)
        weights, chosen = route(x, gate, top_k, normalize, lists)
        expected_weights, expected = reference.route(x, gate, top_k, normalize)
        assert torch.equal(chosen, expected)
        torch.testing.assert_close(weights, expected_weights)
        for expert, count in enumerate(lists.counts.tolist()):
            choices = (expected.view(-1) == expert).nonzero().view(-1).tolist()
            assert sorted(lists.choices[expert, :count].tolist()) == choices
        lists.counts.zero_()


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


def mixture(rows: int, hidden: int, inner: int, num_experts: int, top_k: int, dtype: torch.dtype) -> Mixture:
    return Mixture(
        gate=random(num_experts, hidden, dtype=dtype, seed=3) * 0.1,
        gate_up=random(num_experts, 2 * inner, hidden, dtype=dtype, seed=1) * hidden**-0.5,
        down=random(num_experts, hidden, inner, dtype=dtype, seed=2) * inner**-0.5,
        top_k=top_k,
        normalize=True,
    )


def assert_right(rows: int, own: Mixture, equal: Mixture, plan: moe.Plan | None = None) -> None:
    """`own` by kernels is `equal` by the reference, between two additions to a residual stream and their norms."""
    hidden, dtype = own.gate.shape[1], own.gate.dtype
    x, residual = random(rows, hidden, dtype=dtype), random(rows, hidden, dtype=dtype, seed=4)
    norms = [1 + 0.1 * random(hidden, dtype=dtype, seed=5 + i) for i in range(2)]
    expected_residual = residual.clone()
    y = reference.add_rms_norm(x, expected_residual, norms[0], 1e-6)
    choice = reference.route(y, equal.gate, equal.top_k, equal.normalize)
    assert isinstance(equal.gate_up, torch.Tensor)
    assert isinstance(equal.down, torch.Tensor)
    y = reference.experts(y, equal.gate_up, equal.down, *choice)
    y = reference.add_rms_norm(y, expected_residual, norms[1], 1e-6)
    before, after = (AddNorm(residual, norm, 1e-6) for norm in norms)
    assert_near(moe.mixture(x, before, own, after, plan), y)
    assert_near(residual, expected_residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "hidden", "inner", "num_experts", "top_k"),
    [(1, 64, 48, 8, 3), (1, 96, 128, 5, 1), (2, 64, 40, 7, 7), (21, 100, 60, 4, 2), (150, 64, 128, 2, 1)],
)
def test_mixture(rows: int, hidden: int, inner: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
    case = mixture(rows, hidden, inner, num_experts, top_k, dtype)
    for _ in range(2):  # counts are zero again
        assert_right(rows, case, case)


@pytest.mark.parametrize("rows", [1, 30])
def test_float8_experts(rows: int) -> None:
    case = mixture(rows, 96, 64, 6, 3, torch.float16)
    eighths = []
    for weight in (case.gate_up, case.down):
        assert isinstance(weight, torch.Tensor)
        flat = pack_fp8(weight.flatten(0, 1))
        eighths.append(Fp8Weight(flat.values.view(weight.shape), flat.scales.view(weight.shape[:2])))
    plain = [(weight.values.float() * weight.scales[:, :, None]).half() for weight in eighths]
    own = replace(case, gate_up=eighths[0], down=eighths[1])
    assert_right(rows, own, replace(case, gate_up=plain[0], down=plain[1]))


@pytest.mark.parametrize("resident", [False, True])
def test_plans(resident: bool) -> None:
    """Many rows of few experts, one without any; tiles that end within a block."""
    case = mixture(90, 64, 80, 5, 2, torch.float16)
    case.gate[4] = 0  # the others' weights are larger in sum, mostly
    plan = moe.Plan(32, Tuning(64, 64, 4, 2), Tuning(32, 32, 4, 2), resident)
    assert_right(90, case, case, plan)


def test_without_what_comes_before_and_after() -> None:
    """Where the sum has been made, and where what comes after rounds for a product."""
    case, residual = mixture(33, 64, 32, 4, 2, torch.float32), random(33, 64)
    norm = random(64, seed=1)
    y = reference.rms_norm(residual, norm, 1e-6)
    assert isinstance(case.gate_up, torch.Tensor)
    assert isinstance(case.down, torch.Tensor)
    y = reference.experts(y, case.gate_up, case.down, *reference.route(y, case.gate, 2, True))
    assert_near(moe.mixture(None, AddNorm(residual, norm, 1e-6), case, None), y)


@pytest.mark.parametrize(("rows", "num_used"), [(9, 5), (40, 17)])
def test_padding_reads_no_experts(rows: int, num_used: int) -> None:
    """Rows that pad a batch change no others, and choose nothing: their experts' weights would be read."""
    case = mixture(rows, 64, 32, 12, 3, torch.float32)
    x, residual, norm = random(rows, 64), random(rows, 64, seed=4), random(64, seed=5)
    used = torch.tensor([num_used], dtype=torch.int32, device=x.device)
    results = []
    for own in (None, used):
        summed = residual.clone()
        results.append(moe.mixture(x, AddNorm(summed, norm, 1e-6), case, AddNorm(summed, norm, 1e-6), num_used=own))
    assert torch.equal(results[0][:num_used], results[1][:num_used])
    assert bool(results[1].isfinite().all())
    lists = Lists.empty(rows, 12, x.device, used)
    chosen = route(x, case.gate, 3, True, lists)[1]
    assert lists.counts.tolist() == chosen[:num_used].view(-1).bincount(minlength=12).tolist()
    lists.counts.zero_()


def test_no_rows() -> None:
    case, empty = mixture(3, 64, 32, 4, 2, torch.float32), random(0, 64)
    before = AddNorm(empty, random(64), 1e-6)
    assert moe.mixture(empty, before, case, before).shape == (0, 64)
    assert route(empty, case.gate, 2, True)[0].shape == (0, 2)
