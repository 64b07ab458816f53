"""Native norms and activations against the reference."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cpu.cpu_common import DTYPES, TOLERANCE, error
from trine.kernels import cpu, reference

SIZES = [(1, 1), (1, 896), (3, 20), (2, 7), (5, 4097), (130, 896), (700, 130)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(native: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for rows, size in SIZES:
        x, weight, bias = (torch.randn(n, size).to(dtype) for n in (rows, 1, 1))
        weight, bias = weight[0], bias[0]
        assert error(cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)) < TOLERANCE[dtype]
        if size > 1:
            actual = cpu.layer_norm(x * 3 + 2, weight, bias, 1e-5)
            assert error(actual, reference.layer_norm(x * 3 + 2, weight, bias, 1e-5)) < TOLERANCE[dtype]
        ours, theirs = torch.randn(2, 1, rows, size).to(dtype)[0].repeat(2, 1, 1)
        actual, expected = cpu.add_rms_norm(x, ours, weight, 1e-5), reference.add_rms_norm(x, theirs, weight, 1e-5)
        assert torch.equal(ours, theirs)
        assert error(actual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(native: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for rows, size in SIZES:
        x = (torch.randn(rows, 2 * size) * 5).to(dtype)
        assert error(cpu.silu_mul(x), reference.silu_mul(x)) < TOLERANCE[dtype]
        assert error(cpu.gelu(x, "tanh"), reference.gelu(x, "tanh")) < TOLERANCE[dtype]
        assert error(cpu.gelu(x, "none"), reference.gelu(x, "none")) < TOLERANCE[dtype]


def test_activations_at_their_ends(native: str) -> None:
    x = torch.tensor([[-1e4, -100.0, -88.0, -20.0, -1e-20, 0.0, 1e-20, 20.0, 88.0, 100.0, 1e4]])
    for approximate in ("tanh", "none"):
        assert torch.allclose(cpu.gelu(x, approximate), reference.gelu(x, approximate), rtol=1e-5, atol=1e-6)
    pair = torch.cat((x, torch.ones_like(x)), dim=1)
    assert torch.allclose(cpu.silu_mul(pair), reference.silu_mul(pair), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_nearest_even(native: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, 1000)
    identity = torch.eye(1000)
    assert torch.equal(cpu.linear(x, cpu.pack_weight(identity), out_dtype=dtype), x.to(dtype))
    x[0, 0] = torch.nan
    weight = torch.ones(1000)
    assert cpu.rms_norm(x.to(dtype), weight.to(dtype), 1e-5)[0].isnan().all()
