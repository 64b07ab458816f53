"""Native linear layers against float64 products, and their independence of the batch."""

from __future__ import annotations

import psutil
import pytest
import torch

from tests.kernels.cpu.cpu_common import DTYPES, TOLERANCE, error
from trine.kernels import cpu

SHAPES = [  # rows, N, K: odd sizes, sizes below a panel, many blocks of rows, several passes over the rows
    (1, 16, 32),
    (1, 1, 1),
    (2, 33, 77),
    (3, 130, 5),
    (4, 48, 100),
    (7, 31, 1030),
    (8, 272, 896),
    (19, 64, 515),
    (33, 17, 64),
    (130, 144, 96),
    (700, 48, 70),
]


def weights(n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n * 1000 + k)
    return (
        (torch.randn(n, k, generator=generator) / k**0.5).to(dtype),
        torch.randn(n, generator=generator).to(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_equals_the_exact_product(native: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for rows, n, k in SHAPES:
        weight, bias = weights(n, k, dtype)
        x = torch.randn(rows, k).to(dtype)
        packed = cpu.pack_weight(weight)
        assert packed.shape == weight.shape
        exact = x.double() @ weight.double().T
        assert error(cpu.linear(x, packed), exact) < TOLERANCE[dtype]
        assert error(cpu.linear(x, packed, bias), exact + bias.double()) < TOLERANCE[dtype]
        wide = cpu.linear(x, packed, bias, out_dtype=torch.float32)
        assert wide.dtype == torch.float32
        assert error(wide, exact + bias.double()) < 2e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_silu_mul_equals_its_parts(native: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for rows, n, k in [(1, 64, 32), (5, 96, 130), (20, 34, 64), (150, 160, 96)]:
        weight, bias = weights(n, k, dtype)
        x = torch.randn(rows, k).to(dtype)
        for b in (None, bias):
            product = x.double() @ weight.double().T + (0 if b is None else b.double())
            gate, up = product.chunk(2, dim=1)
            expected = gate * torch.sigmoid(gate) * up
            assert error(cpu.linear_silu_mul(x, cpu.pack_weight(weight), b), expected) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8"])
def test_a_row_does_not_depend_on_its_batch(native: str, kind: str) -> None:
    dtype = torch.bfloat16 if kind == "int8" else getattr(torch, kind)
    torch.manual_seed(2)
    weight, bias = weights(176, 650, dtype)
    packed = cpu.pack_int8(weight) if kind == "int8" else cpu.pack_weight(weight)
    x = torch.randn(600, 650).to(dtype)
    plain = cpu.linear(x, packed, bias, out_dtype=torch.float32)
    gated = cpu.linear_silu_mul(x, packed, bias)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 17, 18, 19, 31, 32, 33, 48, 65, 145):
        for start in (0, 1, 300, 600 - rows):
            part = slice(start, start + rows)
            assert torch.equal(cpu.linear(x[part], packed, bias, out_dtype=torch.float32), plain[part])
            assert torch.equal(cpu.linear_silu_mul(x[part], packed, bias), gated[part])


def test_rows_of_a_wider_tensor_are_read_in_place(native: str) -> None:
    weight, _ = weights(40, 24, torch.float32)
    wide = torch.randn(9, 64)
    packed = cpu.pack_weight(weight)
    assert torch.equal(cpu.linear(wide[:, 8:32], packed), cpu.linear(wide[:, 8:32].contiguous(), packed))
    assert torch.equal(cpu.linear(wide.T[:24].T, packed), cpu.linear(wide[:, :24].contiguous(), packed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_is_exact_and_rows_can_be_gathered(native: str, dtype: torch.dtype) -> None:
    for n, k in [(1, 1), (37, 50), (64, 128)]:
        weight, _ = weights(n, k, dtype)
        packed = cpu.pack_weight(weight)
        assert torch.equal(packed.unpack(), weight)
        ids = torch.randint(0, n, (13,))
        assert torch.equal(cpu.embedding(ids, packed, dtype), weight[ids])
    with pytest.raises(IndexError, match="table of 64 rows"):
        cpu.embedding(torch.tensor([64]), packed, dtype)
    assert cpu.embedding(torch.tensor([], dtype=torch.int64), packed, dtype).shape == (0, 128)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(native: str, dtype: torch.dtype) -> None:
    weight, _ = weights(40, 24, dtype)
    for packed in (cpu.pack_weight(weight), cpu.pack_int8(weight)):
        assert cpu.linear(torch.empty(0, 24, dtype=dtype), packed).shape == (0, 40)


@pytest.mark.parametrize("group", [64, 128])
def test_int8_is_as_good_as_its_rounding(native: str, group: int) -> None:
    """Against the product with the rounded weight (exact but for x's rounding to 16 bits) and with the true one."""
    torch.manual_seed(3)
    for rows, n, k in [(1, 16, 64), (1, 33, 70), (3, 48, 896), (8, 80, 300), (21, 64, 512), (140, 32, 896)]:
        weight, bias = weights(n, k, torch.float32)
        x = torch.randn(rows, k)
        packed = cpu.pack_int8(weight, group)
        rounded = packed.unpack()
        assert error(rounded, weight) < 0.006
        y = cpu.linear(x, packed, bias)
        assert error(y, x.double() @ rounded.double().T + bias.double()) < 2e-4
        exact = x.double() @ weight.double().T
        relative = (cpu.linear(x, packed).double() - exact).norm() / exact.norm()
        assert relative < 0.01
        gate, up = (x.double() @ rounded.double().T).chunk(2, dim=1)
        if n % 32 == 0:
            assert error(cpu.linear_silu_mul(x, packed), gate * torch.sigmoid(gate) * up) < 5e-4


def test_int8_handles_zeros_and_outliers(native: str) -> None:
    weight = torch.zeros(20, 256)
    assert torch.equal(cpu.linear(torch.randn(2, 256), cpu.pack_int8(weight)), torch.zeros(2, 20))
    weight[3, 7] = 1000.0
    weight[3, 200] = 0.001
    x = torch.zeros(2, 256)
    x[0, 200] = 1.0
    x[1, 7] = -2.0
    y = cpu.linear(x, cpu.pack_int8(weight))
    assert y[0, 3] == pytest.approx(0.001, rel=0.01)
    assert y[1, 3] == pytest.approx(-2000.0, rel=0.01)


def test_int8_group_size_is_checked() -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        cpu.pack_int8(torch.zeros(2, 2), 100)


def test_memory_of_a_dropped_weight_is_given_back(native: str) -> None:
    assert cpu.pack_weight(torch.zeros(160, 64)).nbytes == 160 * 64 * 4
    process = psutil.Process()
    weight = torch.zeros(1024, 4096)  # 16 MB
    cpu.pack_weight(weight)
    before = process.memory_info().rss
    for _ in range(16):
        cpu.pack_weight(weight)
    assert process.memory_info().rss - before < 64 << 20
