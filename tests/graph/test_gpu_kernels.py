"""Kernels of compiled graphs against torch, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

pytest.importorskip("triton")

from trine.graph.gpu import operators
from trine.graph.gpu.kernels import attention, convolution, norm, window
from trine.graph.gpu.kernels.convolution import Tile, Window
from trine.graph.operators.algebra import activate
from trine.kernels import fp8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half().to(DEVICE)


def image(*shape: int) -> torch.Tensor:
    return randn(*shape).contiguous(memory_format=torch.channels_last)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, limit: float = 1e-3) -> None:
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).norm() <= limit * expected.double().norm()


@pytest.mark.parametrize(
    "activation", ["", "relu", "relu6", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "hardswish"]
)
def test_linear(activation: str) -> None:
    x, weight, bias, residual = (
        randn(2, 19, 40),
        randn(24, 40, seed=1) * 0.1,
        randn(24, seed=2),
        randn(2, 19, 24, seed=3),
    )
    expected = activate(F.linear(x.float(), weight.float(), bias.float()) + residual.float(), activation)
    assert_near(convolution.linear(x, weight, bias, residual, activation, Tile(16, 16, 32)), expected)


@pytest.mark.parametrize("splits", [2, 3, 7])
def test_a_split_inner_dimension(splits: int) -> None:
    """A launch leaves the counters ready for the next; parts without numbers add nothing."""
    tile = Tile(16, 16, 32, splits=splits)
    x, weight, bias, residual = randn(19, 136), randn(24, 136, seed=1) * 0.1, randn(24, seed=2), randn(19, 24, seed=3)
    expected = torch.relu(F.linear(x.float(), weight.float(), bias.float()) + residual.float())
    arrivals = tile.arrivals(19, 24, x.device)
    pixels, taps = image(1, 16, 5, 4), randn(24, 16, 3, 3, seed=4) * 0.1
    wanted = F.conv2d(pixels.float(), taps.float(), None, 1, 1)
    others = tile.arrivals(20, 24, x.device)
    for _ in range(2):
        assert_near(convolution.linear(x, weight, bias, residual, "relu", tile, arrivals=arrivals), expected)
        y = convolution.convolution(
            pixels, convolution.pack(taps), None, None, Window((3, 3), (1, 1), (1, 1)), (5, 4), "", tile, others
        )
        assert_near(y, wanted)


def test_fast_gelu_is_near() -> None:
    x, weight = randn(33, 32), torch.eye(32).half().to(DEVICE)
    assert_near(convolution.linear(x, weight, None, None, "gelu_fast", Tile(16, 16, 32)), F.gelu(x.float()), 2e-3)


@pytest.mark.parametrize(
    ("channels", "filters", "kernel", "stride", "pad", "dilation"),
    [(32, 40, 3, 1, 1, 1), (16, 8, 3, 2, 1, 1), (3, 16, 7, 2, 3, 1), (24, 16, 1, 2, 0, 1), (16, 16, 3, 1, 2, 2)],
)
def test_convolution(channels: int, filters: int, kernel: int, stride: int, pad: int, dilation: int) -> None:
    x, weight = image(2, channels, 9, 7), randn(filters, channels, kernel, kernel, seed=1) * 0.1
    bias = randn(filters, seed=2)
    plain = F.conv2d(x.float(), weight.float(), bias.float(), stride, pad, dilation)
    residual = image(*plain.shape)
    where = Window((kernel, kernel), (stride, stride), (pad, pad), (dilation, dilation))
    size = (plain.shape[2], plain.shape[3])
    tile = Tile(32, 16, 16)
    y = convolution.convolution(x, convolution.pack(weight), bias, residual, where, size, "relu", tile)
    assert_near(y, torch.relu(plain + residual.float()))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1)])
def test_depthwise(kernel: int, stride: int) -> None:
    x, weight, bias = image(2, 24, 9, 7), randn(24, 1, kernel, kernel, seed=1), randn(24, seed=2)
    expected = F.conv2d(x.float(), weight.float(), bias.float(), stride, kernel // 2, 1, 24)
    where = Window((kernel, kernel), (stride, stride), (kernel // 2, kernel // 2))
    taps = weight.flatten(1).t().contiguous()
    y = window.depthwise(x, taps, bias, None, where, (expected.shape[2], expected.shape[3]), "relu6")
    assert_near(y, F.relu6(expected))


def test_transposed_convolution_whose_windows_do_not_overlap() -> None:
    x, weight, bias = image(2, 24, 4, 3), randn(24, 12, 2, 2, seed=1), randn(12, seed=2)
    rows = weight.permute(2, 3, 1, 0).flatten(0, 2).contiguous()
    expected = F.conv_transpose2d(x.float(), weight.float(), bias.float(), 2)
    assert_near(convolution.spread_linear(x, rows, bias, 2, Tile(16, 16, 16)), expected)


def test_an_image_made_of_two() -> None:
    """A spread product and a copy write to their channels of one image."""
    x, rows, other = image(2, 24, 4, 3), randn(4 * 12, 24, seed=1), image(2, 20, 8, 6)
    y = image(2, 32, 8, 6)
    part = convolution.spread_linear(x, rows, None, 2, Tile(16, 16, 16), y[:, 20:])
    window.copy_image(other, y[:, :20])
    assert torch.equal(y[:, :20], other)
    assert torch.equal(part, convolution.spread_linear(x, rows, None, 2, Tile(16, 16, 16)))
    assert part.data_ptr() == y[:, 20:].data_ptr()


def test_pooling_and_what_follows_a_convolution() -> None:
    x, bias = image(2, 24, 9, 7), randn(24, seed=2)
    expected = F.max_pool2d(x.float(), 3, 2, 1)
    assert_near(window.max_pool(x, Window((3, 3), (2, 2), (1, 1)), (expected.shape[2], expected.shape[3])), expected, 0)
    assert_near(window.mean(x), x.float().mean((2, 3), keepdim=True))
    y = x.clone(memory_format=torch.preserve_format)
    assert_near(window.finish_image(y, bias, x, "relu"), torch.relu(2 * x.float() + bias.float()[:, None, None]))


@pytest.mark.parametrize(("length", "keys", "size"), [(37, 37, 64), (20, 70, 32), (5, 16, 48)])
@pytest.mark.parametrize("mask", [None, (2, 1, 1, 0), (1, 2, -1, 0)])
def test_attention(length: int, keys: int, size: int, mask: tuple[int, ...] | None) -> None:
    q = randn(2, length, 6 * size).split(2 * size, -1)[1]
    k, v = randn(2, keys, 4 * size, seed=1).split(2 * size, -1)
    shape = None if mask is None else [*mask[:2], length if mask[2] < 0 else 1, keys]
    given = None if shape is None else randn(*shape, seed=2)
    wide = None if given is None else given.float()
    expected = operators.heads_attention(q.float(), k.float(), v.float(), wide, heads=2, scale=0.125)
    assert_near(attention.heads_attention(q, k, v, given, 2, 0.125), expected)


def test_guarded_attention_gives_zeros_where_every_key_is_hidden() -> None:
    q, k, v = randn(1, 5, 32), randn(1, 7, 32, seed=1), randn(1, 7, 32, seed=2)
    mask = torch.zeros(1, 1, 5, 7, device=DEVICE)
    mask[..., 2, :] = -torch.inf
    mask[..., 3, 4:] = -torch.inf
    expected = operators.heads_attention(q.float(), k.float(), v.float(), mask, heads=2, scale=0.25, guarded=1)
    assert not expected[0, 2].any()
    assert_near(attention.heads_attention(q, k, v, mask, 2, 0.25, guarded=True), expected)


@pytest.mark.parametrize("summed", [False, True])
def test_norm(summed: bool) -> None:
    x, residual, scale, bias = randn(5, 100), randn(5, 100, seed=1), randn(100, seed=2), randn(100, seed=3)
    other = residual if summed else None
    y, total, low = norm.add_layer_norm(x, other, scale, bias, 1e-5, (True, summed, True), 0.02)
    expected = operators.add_layer_norm(x, other, scale, bias, epsilon=1e-5, out_scale=0.02)
    assert y is not None and low is not None  # noqa: PT018
    assert_near(y, expected[0])
    if summed:
        assert total is not None
        assert_near(total, expected[1])
    assert_near(low.float() * 0.02, expected[0], 0.1)  # the interpreter rounds float8 towards zero


def test_float8_linear() -> None:
    x, weight, bias = fp8.saturate(randn(33, 64), 0.01), fp8.pack_fp8(randn(48, 64, seed=1).float()), randn(48, seed=2)
    y = convolution.linear(
        x, weight.values, bias, None, "relu", Tile(32, 32, 32), weight.scales, 0.01, out_dtype=torch.float16
    )
    assert_near(y, operators.fp8_linear(x, weight.values, weight.scales, bias, scale=0.01, activation="relu"), 2e-3)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("rows", [128, 1000])
@pytest.mark.parametrize("outputs", [768, 400])
def test_hopper_linear(rows: int, outputs: int) -> None:
    from trine.graph.gpu.kernels.hopper_linear import TILES, hopper_linear

    x, weight, bias = randn(rows, 256).bfloat16(), randn(outputs, 256, seed=1).bfloat16(), randn(outputs).bfloat16()
    expected = F.linear(x.float(), weight.float(), bias.float())
    low, packed = fp8.saturate(x, 0.01), fp8.pack_fp8(weight)
    rounded = operators.fp8_linear(low, packed.values, packed.scales, bias, scale=0.01, activation="gelu")
    for tile in TILES:
        assert_near(hopper_linear(x, weight, bias, "", tile), expected, 5e-3)
        y = hopper_linear(low, packed.values, bias, "gelu", tile, packed.scales * 0.01, 0.5)
        assert_near(y.float() * 0.5, rounded, 5e-2)


def test_hopper_linear_compiles() -> None:
    pytest.importorskip("triton.experimental.gluon")
    from tests.kernels.hopper_compiler import check_compiles
    from trine.graph.gpu.kernels.hopper_linear import stages

    dtype, tile = "fp16", (192, 128)
    operand, result = f"{dtype}[64, 64]", f"{dtype}[64, {tile[1]}]"
    check_compiles(
        "trine.graph.gpu.kernels.hopper_linear",
        "_linear_kernel",
        {"groups": tile[0] // 64, "first": tile[1], "second": 0, "k_block": 64, "stages": stages(*tile, 2),
         "together": 8, "has_scales": False, "has_bias": True, "activation": 9, "has_rounded": False},
        {"x_desc": operand, "first_desc": f"{dtype}[{tile[1]}, 64]", "second_desc": f"{dtype}[{tile[1]}, 64]",
         "first_out_desc": result, "second_out_desc": result, "bias_ptr": f"*{dtype}", "scales_ptr": "*fp32",
         "inverse_scale": "fp32"},
    )  # fmt: skip
