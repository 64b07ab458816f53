"""Products of few rows as Triton kernels, against PyTorch's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from trine.kernels import reference
from trine.kernels.triton.small_linear import linear, small_gated_linear, small_linear, small_qkv_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize(("inputs", "outputs"), [(896, 50), (4864, 9), (64, 33)])
def test_equals_the_reference(rows: int, inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator).to(DEVICE)
    weight = torch.randn(outputs, inputs, generator=generator).to(DEVICE)
    bias = torch.randn(outputs, generator=generator).to(DEVICE)
    for own_bias in (None, bias):
        expected = reference.linear(x.double(), weight.double(), None if own_bias is None else own_bias.double())
        torch.testing.assert_close(small_linear(x, weight, own_bias), expected.float(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 3])
def test_float8_weights(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 640, generator=generator).to(torch.bfloat16).to(DEVICE)
    weight = torch.randn(40, 640, generator=generator).to(torch.float8_e4m3fn).to(DEVICE)
    scales = torch.rand(40, generator=generator).to(DEVICE)
    expected = x.float() @ (weight.float() * scales[:, None]).T
    actual = small_linear(x, weight, None, scales)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=1e-2, atol=1e-1)


def test_too_many_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="5 rows"):
        small_linear(torch.zeros(5, 64, device=DEVICE), torch.zeros(8, 64, device=DEVICE))


@pytest.mark.parametrize("rows", [1, 2])
def test_linear_takes_any_number_of_rows(rows: int) -> None:
    x = torch.randn(rows, 96).to(torch.float16).to(DEVICE)
    weight, bias = (torch.randn(shape).to(torch.float16).to(DEVICE) for shape in ((20, 96), (20,)))
    actual = linear(x, weight, bias, torch.float32)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, reference.linear(x, weight, bias).float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("has_scales", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(896, 37), (5000, 4)])
def test_gate_and_up_with_their_activation(inputs: int, outputs: int, has_scales: bool) -> None:
    x, weight = torch.randn(1, inputs, device=DEVICE), torch.randn(2 * outputs, inputs, device=DEVICE) / inputs**0.5
    scales = torch.rand(2 * outputs, device=DEVICE) if has_scales else None
    exact = weight.double() if scales is None else weight.double() * scales[:, None]
    expected = reference.silu_mul(reference.linear(x.double(), exact))
    torch.testing.assert_close(small_gated_linear(x, weight, scales), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("has_bias", [False, True])
def test_projection_with_rotation(has_bias: bool) -> None:
    num_heads, num_kv_heads, head_dim, slot = 6, 2, 32, 37
    outputs = (num_heads + 2 * num_kv_heads) * head_dim
    x, weight = torch.randn(1, 100, device=DEVICE), torch.randn(outputs, 100, device=DEVICE)
    bias = torch.randn(outputs, device=DEVICE) if has_bias else None
    cos_sin = torch.randn(50, head_dim, device=DEVICE)
    positions, slots = torch.tensor([17], device=DEVICE), torch.tensor([slot], device=DEVICE)
    ours = [torch.full((5, num_kv_heads, 16, head_dim), torch.nan, device=DEVICE) for _ in range(2)]
    theirs = [cache.clone() for cache in ours]
    heads = (num_heads, num_kv_heads, head_dim)
    qkv = reference.linear(x, weight, bias)
    expected = reference.prepare_qkv(qkv, *heads, positions, cos_sin, None, None, 0.0, *theirs, slots)
    actual = small_qkv_linear(x, weight, bias, *heads, positions, cos_sin, *ours, slots)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4, equal_nan=True)
