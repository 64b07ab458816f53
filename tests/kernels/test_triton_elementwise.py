"""Norms, activations and the fused query-key-value step as Triton kernels, against the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from trine.kernels import reference
from trine.kernels import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (5, 896), (3, 1000)])
def test_norms(rows: int, size: int, dtype: torch.dtype) -> None:
    x, residual = random(rows, size, dtype=dtype), random(rows, size, dtype=dtype, seed=1)
    weight, bias = random(size, dtype=dtype, seed=2), random(size, dtype=dtype, seed=3)
    assert_near(kernels.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    assert_near(kernels.layer_norm(x, weight, bias, 1e-5), reference.layer_norm(x, weight, bias, 1e-5))
    expected_residual = residual.clone()
    expected = reference.add_rms_norm(x, expected_residual, weight, 1e-6)
    assert_near(kernels.add_rms_norm(x, residual, weight, 1e-6), expected)
    assert_near(residual, expected_residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding(dtype: torch.dtype) -> None:
    weight = random(50, 900, dtype=torch.bfloat16)
    ids = torch.tensor([3, 49, 0, 3], device=DEVICE)
    torch.testing.assert_close(kernels.embedding(ids, weight, dtype), reference.embedding(ids, weight, dtype))


@pytest.mark.parametrize("count", [1, 3])
def test_norm_of_parts(count: int) -> None:
    parts, residual, weight = random(count, 5, 896), random(5, 896, seed=1), random(896, seed=2)
    total = parts.sum(0) + residual
    assert_near(kernels.add_rms_norm(parts, residual, weight, 1e-6), reference.rms_norm(total, weight, 1e-6))
    assert_near(residual, total)


def test_norm_of_strided_rows() -> None:
    x = random(4, 200)[:, 30:130]
    weight = random(100, seed=1)
    assert_near(kernels.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    assert_near(kernels.layer_norm(x, weight, weight, 1e-6), reference.layer_norm(x, weight, weight, 1e-6))


def test_sum_of_parts() -> None:
    """What is added to a residual stream, or holds a step's heads, may come in parts, of more rows than are wanted."""
    parts, residual, weight = random(3, 8, 96)[:, :5], random(5, 96, seed=1), random(96, seed=2)
    total, other = parts.sum(0), residual.clone()
    assert_near(kernels.add_rms_norm(parts, residual, weight, 1e-6), reference.add_rms_norm(total, other, weight, 1e-6))
    assert_near(residual, other)
    with pytest.raises(ValueError, match="must be like x"):
        kernels.add_rms_norm(parts[:, :4], residual, weight, 1e-6)
    places, cos_sin = torch.arange(5, device=DEVICE) + 3, random(10, 16, seed=3)
    found = []
    for qkv in (parts, total.clone()):
        caches = [torch.zeros(1, 2, 16, 16, device=DEVICE) for _ in range(2)]
        q = kernels.prepare_qkv(qkv, 2, 2, 16, places, cos_sin, None, None, 1e-6, *caches, places)
        found.append((q, *caches))
    for actual, expected in zip(*found, strict=True):
        assert_near(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype: torch.dtype) -> None:
    x = random(3, 2 * 1100, dtype=dtype) * 4
    assert_near(kernels.silu_mul(x), reference.silu_mul(x))
    assert_near(kernels.gelu(x, "tanh"), reference.gelu(x, "tanh"))
    assert_near(kernels.gelu(x, "none"), reference.gelu(x, "none"))


def test_no_rows() -> None:
    weight = random(64)
    assert kernels.rms_norm(random(0, 64), weight, 1e-6).shape == (0, 64)
    assert kernels.silu_mul(random(0, 64)).shape == (0, 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "rotary_dim", "normed"),
    [
        (4, 2, 64, 64, True),
        (14, 2, 64, 64, False),
        (3, 3, 80, 32, False),
        (20, 20, 96, None, False),
        (5, 1, 128, 64, True),
        (2, 1, 256, 256, False),
    ],
)
def test_prepare_qkv(
    num_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int | None, normed: bool, dtype: torch.dtype
) -> None:
    num_tokens, block_size = 7, 16
    qkv = random(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    positions = torch.tensor([0, 1, 2, 40, 39, 5, 17], device=DEVICE)
    slots = torch.tensor([16, 17, 18, 79, 64, 33, 3], device=DEVICE)
    cos_sin = None if rotary_dim is None else random(41, rotary_dim, seed=1)
    q_norm = random(head_dim, dtype=dtype, seed=2) if normed else None
    k_norm = random(head_dim, dtype=dtype, seed=3) if normed else None
    caches = []
    queries = []
    for module in (reference, kernels):
        k_cache, v_cache = (random(5, num_kv_heads, block_size, head_dim, dtype=dtype, seed=s) for s in (4, 5))
        queries.append(
            module.prepare_qkv(
                qkv.clone(), num_heads, num_kv_heads, head_dim, positions, cos_sin, q_norm, k_norm, 1e-6,
                k_cache, v_cache, slots,
            )
        )  # fmt: skip
        caches.append((k_cache, v_cache))
    assert queries[1].shape == (num_tokens, num_heads, head_dim)
    assert_near(queries[1], queries[0])
    assert_near(caches[1][0], caches[0][0])
    assert torch.equal(caches[1][1], caches[0][1])
