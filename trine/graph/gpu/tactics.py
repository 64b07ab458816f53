"""Candidates: library kernels through torch, and our Triton kernels with the tiles that are worth a try."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from trine.graph.gpu.registry import Kernel, Options, Target, constant_inputs, options_for
from trine.graph.ir import Node, Value
from trine.graph.operators.algebra import activate
from trine.graph.operators.convolution import pad_spatial

NHWC = torch.channels_last


def image(x: Tensor) -> Tensor:
    """x with its channels innermost: no copy where they are, a view where there is one pixel or one channel."""
    return x.contiguous(memory_format=NHWC)


def finish(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """Sum and activation by torch."""
    return activate(y if residual is None else y + residual, activation)


def _shape(value: Value | None) -> tuple[int, ...]:
    shape = None if value is None else value.static_shape
    assert shape is not None, "lowered graphs have static shapes where candidates look"
    return shape


def _size(value: Value | None) -> tuple[int, int]:
    """Height and width of an image, or of a convolution's kernel."""
    height, width = _shape(value)[2:]
    return height, width


def _given(x: Tensor | None) -> Tensor:
    assert x is not None, "candidates check what they need"
    return x


# ---------------------------------------------------------------- linear layers


def _activation(node: Node, target: Target) -> str:
    """The activation; GELU by tanh where the type is too narrow to tell: they differ by less than 1e-3."""
    name: str = node.attributes["activation"]
    return "gelu_fast" if name in ("gelu", "gelu_tanh") and target.dtype is not torch.float32 else name


@options_for("Linear")
def torch_linear(node: Node, target: Target) -> Options:
    """cuBLAS, with the bias in its epilogue, and the activation too where it knows it."""
    if not constant_inputs(node, 1, 2) or node.inputs[1] is None:
        return
    activation = node.attributes["activation"]

    def make() -> Kernel:
        weight, bias = target.constant(node.inputs[1]), target.optional(node.input(2))  # type: ignore[arg-type]

        def run(x: Tensor, w: Any = None, b: Any = None, residual: Tensor | None = None) -> Tensor:
            return finish(F.linear(x, weight, bias), residual, activation)

        return run

    def make_epilogue(gelu: bool) -> Kernel:
        weight, bias = target.constant(node.inputs[1]), target.optional(node.input(2))  # type: ignore[arg-type]

        def run(x: Tensor, w: Any = None, b: Any = None) -> Tensor:
            y = torch._addmm_activation(_given(bias), x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=gelu)
            return y.view(*x.shape[:-1], -1)

        return run

    yield "torch", make
    if target.cuda and node.input(2) is not None and node.input(3) is None:
        if activation == "relu":
            yield "cublas_relu", partial(make_epilogue, False)
        elif activation in ("gelu_tanh", "gelu") and target.dtype is not torch.float32:
            # by tanh, which differs from the exact one by less than 5e-4: the step of bfloat16 between 0.06 and 0.12
            yield "cublas_gelu", partial(make_epilogue, True)


_FEW_ROWS = ("16x16x256w4s3", "16x32x128w4s4", "16x64x64w4s5", "32x32x128w4s4")
_SOME_ROWS = ("32x32x128w4s4", "64x32x128w4s4", "64x64x64w4s4", "32x64x128w4s3", "64x64x128w4s3", "128x64x64w4s4")
_SPLIT_TILES = ("64x64x64w4s4k4", "64x32x128w4s4k4", "128x64x64w4s4k6", "32x64x128w4s3k4")
_MANY_ROWS = ("128x128x64w8s3", "64x128x64w4s4")


def tile(text: str) -> Any:
    """The Tile that prints as `text`."""
    from trine.graph.gpu.kernels.convolution import Tile

    sizes, _, rest = text.partition("w")
    warps, _, stages = rest.partition("s")
    stages, _, splits = stages.partition("k")
    rows, columns, inner = (int(part) for part in sizes.split("x"))
    return Tile(rows, columns, inner, int(warps), int(stages), int(splits or 1))


def _tiles(rows: int) -> tuple[str, ...]:
    if rows <= 32:
        return _FEW_ROWS
    return _SOME_ROWS if rows <= 512 else _MANY_ROWS


@options_for("Linear")
def triton_linear(node: Node, target: Target) -> Options:
    """Our product with everything in its epilogue."""
    if not target.products or not constant_inputs(node, 1, 2) or node.inputs[1] is None:
        return
    rows = prod(_shape(node.inputs[0])[:-1])

    def make(text: str) -> Kernel:
        from trine.graph.gpu.kernels.convolution import linear

        weight = target.constant(node.inputs[1], "rows", Tensor.contiguous)  # type: ignore[arg-type]
        bias, activation, chosen = target.optional(node.input(2)), _activation(node, target), tile(text)
        arrivals = chosen.arrivals(rows, weight.shape[0], target.device)

        def run(x: Tensor, w: Any = None, b: Any = None, residual: Tensor | None = None) -> Tensor:
            residual = None if residual is None else residual.contiguous()
            return linear(x.contiguous(), weight, bias, residual, activation, chosen, arrivals=arrivals)

        return run

    for text in _tiles(rows):
        yield f"triton_{text}", partial(make, text)
    if rows <= 512 and _shape(node.inputs[1])[1] >= 1024:
        for text in _SPLIT_TILES:
            yield f"triton_{text}", partial(make, text)


@options_for("Linear")
def hopper_linear(node: Node, target: Target) -> Options:
    """Our product for many rows by the copy engine and warps with roles."""
    weight, activation = node.inputs[1], node.attributes["activation"]
    if weight is None or not _is_hopper(target) or node.input(3) is not None or not constant_inputs(node, 1, 2):
        return
    (outputs, inputs), rows = _shape(weight), prod(_shape(node.inputs[0])[:-1])
    if rows < 512 or target.dtype is torch.float32:
        return
    from trine.graph.gpu.kernels.hopper_linear import TILES, hopper_linear, supports

    def make(sizes: tuple[int, int]) -> Kernel:
        matrix, bias = target.constant(weight, "rows", Tensor.contiguous), target.optional(node.input(2))
        return lambda x, w=None, b=None: hopper_linear(x.contiguous(), matrix, bias, activation, sizes)

    if supports(inputs, outputs, 2, activation):
        for sizes in TILES:
            yield f"hopper_{sizes[0]}x{sizes[1]}", partial(make, sizes)


def _is_hopper(target: Target) -> bool:
    return target.cuda and torch.cuda.get_device_capability(target.device)[0] == 9


@options_for("Fp8Linear")
def fp8_linear(node: Node, target: Target) -> Options:
    """cuBLAS's product with a scale a row and column, or ours, which also applies the activation and rounds again."""
    if not constant_inputs(node, 1, 3) or node.inputs[1] is None or node.inputs[2] is None or not target.triton:
        return
    a, out_scale = node.attributes, node.attributes.get("out_scale", 0.0)
    (outputs, inputs), rows = _shape(node.inputs[1]), prod(_shape(node.inputs[0])[:-1])

    def constants() -> tuple[Tensor, Tensor, Tensor | None]:
        weight, scales = node.inputs[1], node.inputs[2]
        assert weight is not None
        assert scales is not None
        return target.constant(weight), scales.data.to(target.device), target.optional(node.input(3))

    def make_library() -> Kernel:
        from trine.graph.gpu.kernels.norm import quantize

        weight, scales, bias = constants()
        row_scales = torch.full((rows, 1), a["scale"], device=target.device)

        def run(x: Tensor, w: Any = None, s: Any = None, b: Any = None, residual: Tensor | None = None) -> Tensor:
            y = torch._scaled_mm(
                x.reshape(rows, inputs), weight.t(), scale_a=row_scales, scale_b=scales[None, :], bias=bias,
                out_dtype=torch.bfloat16, use_fast_accum=True,
            ).view(*x.shape[:-1], outputs)  # fmt: skip
            y = finish(y, residual, a["activation"])
            return quantize(y, out_scale) if out_scale else y

        return run

    def make(text: str) -> Kernel:
        from trine.graph.gpu.kernels.convolution import linear

        weight, scales, bias = constants()
        chosen = tile(text)

        def run(x: Tensor, w: Any = None, s: Any = None, b: Any = None, residual: Tensor | None = None) -> Tensor:
            return linear(
                x.contiguous(), weight, bias, residual, _activation(node, target), chosen,
                scales, a["scale"], out_scale, target.dtype,
            )  # fmt: skip

        return run

    def make_hopper(sizes: tuple[int, int]) -> Kernel:
        from trine.graph.gpu.kernels.hopper_linear import hopper_linear

        weight, scales, bias = constants()
        scaled = scales * a["scale"]
        return lambda x, w=None, s=None, b=None, residual=None: hopper_linear(
            x.contiguous(), weight, bias, a["activation"], sizes, scaled, out_scale, target.dtype
        )

    if _is_hopper(target) and rows >= 512 and node.input(4) is None:
        from trine.graph.gpu.kernels.hopper_linear import TILES, supports

        if supports(inputs, outputs, 1, a["activation"]):
            for sizes in TILES:
                yield f"hopper_{sizes[0]}x{sizes[1]}", partial(make_hopper, sizes)
    for text in ("128x128x128w8s3", "64x128x128w4s4", "64x64x128w4s4"):
        yield f"triton_{text}", partial(make, text)
    if target.cuda and target.dtype is torch.bfloat16:
        yield "scaled_mm", make_library


@options_for("QuantizeFp8")
def quantize_fp8(node: Node, target: Target) -> Options:
    def make() -> Kernel:
        from trine.graph.gpu.kernels.norm import quantize

        return lambda x: quantize(x.contiguous(), node.attributes["scale"])

    if target.triton:
        yield "triton", make


# ---------------------------------------------------------------- convolutions


def _window(node: Node) -> Any:
    from trine.graph.gpu.kernels.convolution import Window

    a, kernel = node.attributes, _size(node.inputs[1])
    return Window(kernel, tuple(a["strides"]), tuple(a["pads"][:2]), tuple(a["dilations"]))


@options_for("FusedConv")
def torch_convolution(node: Node, target: Target) -> Options:
    """cuDNN on channels-last images; its own fusion of bias, residual and ReLU; or our epilogue after it."""
    if not constant_inputs(node, 1, 2) or node.inputs[1] is None:
        return
    a = node.attributes
    pads, activation = list(a["pads"]), a["activation"]
    outer = pads if pads[:2] != pads[2:] or min(pads) < 0 else None
    inner = [0, 0] if outer else pads[:2]
    places: tuple[Any, ...] = (a["strides"], inner, a["dilations"], a["group"])

    def prepared(x: Tensor) -> Tensor:
        return image(x if outer is None else pad_spatial(x, outer))

    def constants() -> tuple[Tensor, Tensor | None]:
        return target.constant(node.inputs[1], "image", image), target.optional(node.input(2))  # type: ignore[arg-type]

    def make() -> Kernel:
        weight, bias = constants()

        def run(x: Tensor, w: Any = None, b: Any = None, residual: Tensor | None = None) -> Tensor:
            return finish(F.conv2d(prepared(x), weight, bias, *places), residual, activation)

        return run

    def make_fused() -> Kernel:
        weight, bias = constants()

        def run(x: Tensor, w: Any = None, b: Any = None, residual: Tensor | None = None) -> Tensor:
            if residual is None:
                return torch.cudnn_convolution_relu(prepared(x), weight, bias, *places)
            return torch.cudnn_convolution_add_relu(prepared(x), weight, image(residual), 1.0, bias, *places)

        return run

    def make_epilogue() -> Kernel:
        from trine.graph.gpu.kernels.window import finish_image

        weight, bias = constants()

        def run(x: Tensor, w: Any = None, b: Any = None, residual: Tensor | None = None) -> Tensor:
            y = image(F.conv2d(prepared(x), weight, None, *places))
            return finish_image(y, bias, None if residual is None else image(residual), activation)

        return run

    if target.cuda and activation == "relu" and node.input(2) is not None:
        yield "cudnn_relu", make_fused
    if target.triton and (node.input(2) is not None or node.input(3) is not None or activation):
        yield "cudnn_epilogue", make_epilogue
    yield "torch", make


@options_for("FusedConv")
def rows_convolution(node: Node, target: Target) -> Options:
    """One tap in steps of one is a product of rows of pixels by a matrix: cuBLAS."""
    a, weight = node.attributes, node.inputs[1]
    if weight is None or not constant_inputs(node, 1, 2) or a["group"] != 1 or node.input(3) is not None:
        return
    if _shape(weight)[2:] != (1, 1) or any(a["pads"]) or a["strides"] != [1, 1] or node.input(2) is None:
        return
    if a["activation"] not in ("", "relu") or not target.cuda:
        return

    def make() -> Kernel:
        matrix = target.constant(weight, "rows", lambda data: data.flatten(1).contiguous()).t()
        bias = target.constant(node.inputs[2])  # type: ignore[arg-type]
        filters, relu = matrix.shape[1], a["activation"] == "relu"

        def run(x: Tensor, w: Any = None, b: Any = None) -> Tensor:
            n, channels, height, width = x.shape
            rows = image(x).permute(0, 2, 3, 1).reshape(-1, channels)
            y = torch._addmm_activation(bias, rows, matrix) if relu else torch.addmm(bias, rows, matrix)
            return y.view(n, height, width, filters).permute(0, 3, 1, 2)

        return run

    yield "cublas_rows", make


@options_for("FusedConv")
def patches_convolution(node: Node, target: Target) -> Options:
    """A kernel that steps by its own size sees each pixel once: patches copied to rows, and one product."""
    a, weight = node.attributes, node.inputs[1]
    if weight is None or not constant_inputs(node, 1, 2) or a["group"] != 1 or node.input(3) is not None:
        return
    (down, across), channels = _size(weight), _shape(weight)[1]
    n, (rows, columns) = _shape(node.output)[0], _size(node.output)
    if down * across == 1 or a["strides"] != [down, across] or any(a["pads"]) or a["dilations"] != [1, 1]:
        return

    def make() -> Kernel:
        matrix = target.constant(weight, "taps", lambda w: w.permute(0, 2, 3, 1).flatten(1).contiguous())
        bias, activation = target.optional(node.input(2)), a["activation"]

        def run(x: Tensor, w: Any = None, b: Any = None) -> Tensor:
            x = image(x).permute(0, 2, 3, 1)[:, : rows * down, : columns * across]
            x = x.reshape(n, rows, down, columns, across, channels).transpose(2, 3)
            y = F.linear(x.reshape(n * rows * columns, down * across * channels), matrix, bias)
            return finish(y, None, activation).view(n, rows, columns, -1).permute(0, 3, 1, 2)

        return run

    yield "patches", make


_CONV_TILES = (
    "128x64x64w4s3", "128x128x64w8s3", "64x64x64w4s4", "128x32x64w4s4", "64x32x64w4s4", "32x64x64w4s4",
    "256x64x32w8s4",
)  # fmt: skip


_CONV_FEW_ROWS = ("16x32x128w4s4", "32x32x128w4s4", "64x32x128w4s4")
_CONV_SPLIT_TILES = ("64x32x64w4s4k4", "64x64x64w4s4k8", "32x64x64w4s4k8", "64x32x128w4s4k2")
_CONV_FEW_CHANNELS = ("128x32x32w4s3", "64x64x32w4s3", "128x64x32w8s3", "128x64x16w4s4")


@options_for("FusedConv")
def triton_convolution(node: Node, target: Target) -> Options:
    """Our implicit product with everything in its epilogue; each channel by its own filter, our window kernel."""
    a, weight = node.attributes, node.inputs[1]
    if not target.products or weight is None or not constant_inputs(node, 1, 2) or min(a["pads"]) < 0:
        return
    filters, channels = _shape(weight)[:2]
    n, out_size = _shape(node.output)[0], _size(node.output)

    def make_dense(text: str) -> Kernel:
        from trine.graph.gpu.kernels.convolution import convolution, pack

        packed, bias, chosen = target.constant(weight, "taps", pack), target.optional(node.input(2)), tile(text)
        window, activation = _window(node), a["activation"]
        arrivals = chosen.arrivals(n * prod(out_size), filters, target.device)

        def run(x: Tensor, w: Any = None, b: Any = None, residual: Tensor | None = None) -> Tensor:
            residual = None if residual is None else image(residual)
            return convolution(image(x), packed, bias, residual, window, out_size, activation, chosen, arrivals)

        return run

    def make_depthwise(block: tuple[int, int]) -> Kernel:
        from trine.graph.gpu.kernels.window import depthwise

        taps = target.constant(weight, "depthwise", lambda data: data.flatten(1).t().contiguous())
        bias, window, activation = target.optional(node.input(2)), _window(node), a["activation"]

        def run(x: Tensor, w: Any = None, b: Any = None, residual: Tensor | None = None) -> Tensor:
            residual = None if residual is None else image(residual)
            return depthwise(image(x), taps, bias, residual, window, out_size, activation, block)

        return run

    if a["group"] == 1:
        rows = n * prod(out_size)
        for text in _CONV_TILES:
            chosen = tile(text)
            if chosen.columns <= max(2 * filters, 32) and (rows >= 8192 or chosen.rows <= 128):
                yield f"triton_{text}", partial(make_dense, text)
        if rows <= 4096 and channels * prod(_size(weight)) >= 1024:
            for text in _CONV_SPLIT_TILES:
                yield f"triton_{text}", partial(make_dense, text)
        if rows <= 4096:
            for text in _CONV_FEW_ROWS:
                yield f"triton_{text}", partial(make_dense, text)
        if channels < 16:
            for text in _CONV_FEW_CHANNELS:
                yield f"triton_{text}", partial(make_dense, text)
    elif a["group"] == filters and channels == 1 and _shape(node.inputs[0])[1] == filters:
        for block in ((16, 32), (32, 64), (64, 32), (8, 64), (16, 128)):
            yield f"depthwise_{block[0]}x{block[1]}", partial(make_depthwise, block)


# ---------------------------------------------------------------- pooling


@options_for("MaxPool")
def max_pool(node: Node, target: Target) -> Options:
    a, x = node.attributes, node.inputs[0]
    pads, kernel = a.get("pads") or [0] * 4, a["kernel_shape"]
    plain = a.get("auto_pad", "NOTSET") == "NOTSET" and not a.get("ceil_mode", 0) and min(pads) >= 0
    if x is None or x.rank != 4 or not plain or any(value.name for value in node.outputs[1:]):
        return
    strides, dilations = list(a.get("strides") or [1, 1]), list(a.get("dilations") or [1, 1])
    out_size = _size(node.output)

    def make(block: tuple[int, int]) -> Kernel:
        from trine.graph.gpu.kernels.convolution import Window
        from trine.graph.gpu.kernels.window import max_pool

        window = Window(tuple(kernel), tuple(strides), tuple(pads[:2]), tuple(dilations))
        return lambda x: max_pool(image(x), window, out_size, block)

    if target.triton:
        for block in ((32, 64), (64, 32), (16, 64)):
            yield f"triton_{block[0]}x{block[1]}", partial(make, block)
    if pads[:2] == pads[2:] and all(2 * pads[i] <= kernel[i] for i in range(2)):
        yield "torch", lambda: lambda x: F.max_pool2d(image(x), kernel, strides, pads[:2], dilations)


@options_for("GlobalAveragePool")
def global_average(node: Node, target: Target) -> Options:
    if node.inputs[0] is None or node.inputs[0].rank != 4:
        return

    def make() -> Kernel:
        from trine.graph.gpu.kernels.window import mean

        return lambda x: mean(image(x))

    if target.triton:
        yield "triton", make
    yield "torch", lambda: lambda x: x.mean((2, 3), keepdim=True)


# ---------------------------------------------------------------- attention and norms


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def _guard(y: Tensor) -> Tensor:
    """Zeros where every key was hidden, whichever of torch's kernels served."""
    return torch.where(torch.isnan(y), 0.0, y)


@options_for("HeadsAttention")
def heads_attention(node: Node, target: Target) -> Options:
    a = node.attributes
    heads, scale, out_scale, guarded = a["heads"], a["scale"], a.get("out_scale", 0.0), bool(a.get("guarded", 0))

    def make_torch() -> Kernel:
        def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            mask = mask if mask is None else mask.expand(q.shape[0], 1, q.shape[1], k.shape[1])
            q, k, v = _heads(q, heads), _heads(k, heads), _heads(v, heads)
            y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
            return (_guard(y) if guarded else y).transpose(1, 2).flatten(-2)

        return run

    def make(queries: int, keys: int, warps: int) -> Kernel:
        from trine.graph.gpu.kernels.attention import AttentionTuning, heads_attention

        tuning = AttentionTuning(queries, keys, warps)
        mask_constant = node.input(3)
        fixed = target.constant(mask_constant) if mask_constant is not None and mask_constant.is_constant else None

        def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
            mask = mask if fixed is None else fixed
            return heads_attention(q, k, v, mask, heads, scale, guarded, out_scale, tuning)

        return run

    size = _shape(node.inputs[0])[-1] // heads
    if target.products and size <= 128:
        for sizes in ((64, 64, 4), (128, 64, 4), (64, 128, 4), (64, 32, 4)):
            yield f"triton_{'x'.join(map(str, sizes))}", partial(make, *sizes)
    if not out_scale and (node.input(3) is None or not node.inputs[3].is_constant):  # type: ignore[union-attr]
        yield "torch", make_torch


@options_for("ScaledDotProductAttention")
def attention(node: Node, target: Target) -> Options:
    scale, turned = node.attributes["scale"], node.attributes.get("k_transposed", 0)
    guarded = bool(node.attributes.get("guarded", 0))
    if any(value is not None and value.is_constant for value in node.inputs):
        return

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = mask.reshape(1, -1) if mask is not None and mask.dim() < 2 else mask
        k = k.transpose(-1, -2) if turned else k
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        return _guard(y) if guarded else y

    yield "torch", lambda: run


@options_for("AddLayerNorm")
def add_layer_norm(node: Node, target: Target) -> Options:
    if not constant_inputs(node, 2, 3) or any(value is not None and value.is_constant for value in node.inputs[:2]):
        return
    epsilon, out_scale = node.attributes["epsilon"], node.attributes.get("out_scale", 0.0)
    wanted = (bool(node.outputs[0].name), bool(node.outputs[1].name), bool(out_scale))

    def make(warps: int) -> Kernel:
        from trine.graph.gpu.kernels.norm import add_layer_norm

        weight, bias = target.constant(node.inputs[2]), target.optional(node.input(3))  # type: ignore[arg-type]

        def run(x: Tensor, residual: Tensor | None = None, *rest: Any) -> tuple[Tensor | None, ...]:
            residual = None if residual is None else residual.contiguous()
            return add_layer_norm(x.contiguous(), residual, weight, bias, epsilon, wanted, out_scale, warps)

        return run

    def make_torch() -> Kernel:
        weight, bias = target.constant(node.inputs[2]), target.optional(node.input(3))  # type: ignore[arg-type]

        def run(x: Tensor, residual: Tensor | None = None, *rest: Any) -> tuple[Tensor | None, ...]:
            total = x if residual is None else x + residual
            return F.layer_norm(total, weight.shape, weight, bias, epsilon), total, None

        return run

    size = _shape(node.inputs[0])[-1]
    if target.triton:
        for warps in (2, 4) if size <= 2048 else (4, 8, 16):
            yield f"triton_w{warps}", partial(make, warps)
    if not out_scale:
        yield "torch", make_torch
