"""Products of few rows as Triton kernels, against PyTorch's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from trine.kernels import reference
from trine.kernels.triton.small_linear import linear, small_linear

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
