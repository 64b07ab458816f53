"""Transposed convolutions whose windows do not overlap, alone or joined to another image, as in a U-Net's way up.

Such a convolution is one product whose columns are spread over the output's pixels. Where its result is then joined to
another image, the product writes to its channels of the whole, and only the other image is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from trine.graph.gpu.registry import Kernel, Options, Target, constant_inputs, options_for
from trine.graph.gpu.tactics import image, tile
from trine.graph.ir import Graph, Node
from trine.graph.operators.registry import operator
from trine.graph.passes.pattern import remove_unread, replace_node

_TILES = ("128x64x64w4s3", "128x128x64w8s3", "64x64x64w4s4", "128x128x32w8s3")


@operator("SpreadConcat")
def spread_concat(
    x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, *, steps: int, first: int = 1
) -> Tensor:
    """x [N, C, H, W] transposed-convolved by weight [C, F, steps, steps], in front of (`first`) or behind the channels
    of other [N, G, H steps, W steps]: [N, F + G, H steps, W steps].
    """
    y = F.conv_transpose2d(x, weight, bias, steps)
    return torch.cat([y, other] if first else [other, y], 1)


def is_apart(node: Node) -> bool:
    """Whether a transposed convolution of images has windows that lie side by side."""
    a, weight = node.attributes, node.inputs[1]
    shape = None if weight is None else weight.static_shape
    strides = a.get("strides") or [1, 1]
    if shape is None or len(shape) != 4 or a.get("auto_pad", "NOTSET") != "NOTSET" or a.get("output_shape"):
        return False
    others = any(a.get("pads") or []) or any(a.get("output_padding") or []) or set(a.get("dilations") or [1]) != {1}
    return list(shape[2:]) == list(strides) and strides[0] == strides[1] and a.get("group", 1) == 1 and not others


def join_spread(graph: Graph) -> Graph:
    """The join of such a convolution's result, which nobody else reads, with one other image is one node."""
    users = graph.users()
    for node in list(graph.nodes):
        if node.op != "Concat" or node.attributes.get("axis") != 1 or len(node.inputs) != 2:
            continue
        for first, (value, other) in ((1, node.inputs), (0, node.inputs[::-1])):
            made = None if value is None else value.producer
            if made is None or other is None or other.is_constant or value is other or value in graph.outputs:
                continue
            if made.op == "ConvTranspose" and len(users[made.output]) == 1 and is_apart(made):
                steps = made.attributes["strides"][0]
                inputs = [made.inputs[0], made.inputs[1], made.input(2), other]
                replace_node(graph, node, Node("SpreadConcat", inputs, [], {"steps": steps, "first": first}, made.name))
                break
    remove_unread(graph)
    return graph


def _product(node: Node, target: Target, steps: int, text: str) -> Callable[..., Tensor]:
    """The spread product of x, into `out` if one is given."""
    from trine.graph.gpu.kernels.convolution import spread_linear

    # [C, F, s, s] to rows (vertical, horizontal, filter) of C numbers
    weight = target.constant(node.inputs[1], "spread", lambda w: w.permute(2, 3, 1, 0).flatten(0, 2).contiguous())  # type: ignore[arg-type]
    bias, chosen = target.optional(node.input(2)), tile(text)
    return lambda x, out=None: spread_linear(image(x), weight, bias, steps, chosen, out)


@options_for("SpreadConcat")
def joined(node: Node, target: Target) -> Options:
    """cuDNN and a join, or the product and a copy into one image."""
    if not constant_inputs(node, 1, 2) or node.inputs[1] is None:
        return
    steps, first, filters = node.attributes["steps"], node.attributes["first"], node.inputs[1].data.shape[1]

    def make() -> Kernel:
        weight, bias = target.constant(node.inputs[1], "image", image), target.optional(node.input(2))  # type: ignore[arg-type]
        return lambda x, w, b, other: spread_concat(image(x), weight, bias, image(other), steps=steps, first=first)

    def make_product(text: str) -> Kernel:
        from trine.graph.gpu.kernels.window import copy_image

        product = _product(node, target, steps, text)

        def run(x: Tensor, w: Any, b: Any, other: Tensor) -> Tensor:
            n, channels, height, width = other.shape
            y = torch.empty((n, height, width, filters + channels), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)
            ours, theirs = (y[:, :filters], y[:, filters:]) if first else (y[:, channels:], y[:, :channels])
            product(x, ours)
            copy_image(image(other), theirs)
            return y

        return run

    yield "torch", make
    if target.products:
        for text in _TILES:
            yield f"triton_{text}", partial(make_product, text)


@options_for("ConvTranspose")
def transposed(node: Node, target: Target) -> Options:
    """cuDNN, or, where windows do not overlap, the spread product."""
    a, weight = node.attributes, node.inputs[1]
    pads = a.get("pads") or [0, 0, 0, 0]
    plain = a.get("auto_pad", "NOTSET") == "NOTSET" and not a.get("output_shape") and pads[:2] == pads[2:]
    if weight is None or weight.rank != 4 or not constant_inputs(node, 1, 2) or not plain or min(pads) < 0:
        return
    strides, dilations = a.get("strides") or [1, 1], a.get("dilations") or [1, 1]
    extra, group = a.get("output_padding") or [0, 0], a.get("group", 1)
    if any(extra[i] >= max(strides[i], dilations[i]) for i in range(2)):
        return

    def make() -> Kernel:
        data, bias = target.constant(weight, "image", image), target.optional(node.input(2))
        return lambda x, w=None, b=None: F.conv_transpose2d(
            image(x), data, bias, strides, pads[:2], extra, group, dilations
        )

    def make_product(text: str) -> Kernel:
        product = _product(node, target, strides[0], text)
        return lambda x, w=None, b=None: product(x)

    yield "torch", make
    if target.products and is_apart(node):
        for text in _TILES:
            yield f"triton_{text}", partial(make_product, text)
