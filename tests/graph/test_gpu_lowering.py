"""Lowered graphs mean what they were lowered from, with the nodes that a GPU wants."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.graph.gpu_models import Encoder, Images, encoder_inputs, graph_of
from tests.graph.models import model, node, weights
from trine.graph.errors import InputError
from trine.graph.gpu.fp8 import calibrate, to_fp8
from trine.graph.gpu.lowering import input_shapes, lower
from trine.graph.gpu.registry import Target
from trine.graph.importer import import_model
from trine.graph.ir import Graph
from trine.graph.passes import optimise
from trine.graph.runtime import Program


def lowered(graph: Graph, *inputs: torch.Tensor) -> tuple[Graph, Counter[str]]:
    """The lowered graph, which gives the same results as `graph`."""
    before = str(graph)
    shapes = {value.name: x.shape for value, x in zip(graph.inputs, inputs, strict=True)}
    result = lower(graph, shapes)
    assert str(graph) == before
    with torch.inference_mode():
        for ours, theirs in zip(Program(result).run(*inputs), Program(graph).run(*inputs), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    return result, Counter(item.op for item in result.nodes)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("open_batch", [False, True])
def test_an_encoder(first: bool, open_batch: bool) -> None:
    inputs = encoder_inputs()
    graph = graph_of(Encoder(first), *inputs, open_batch=open_batch)
    result, ops = lowered(graph, *inputs)
    assert ops["HeadsAttention"] == 2
    assert ops["Linear"] == 8  # queries, keys and values are one
    assert ops["AddLayerNorm"] == 5
    assert all(item.origins for item in result.nodes if item.op in ("AddLayerNorm", "HeadsAttention"))
    assert not {"Add", "LayerNormalization", "ScaledDotProductAttention"} & {
        item.op for item in result.nodes[result.nodes.index(next(n for n in result.nodes if n.op == "Linear")) :]
    }
    mask = next(item for item in result.nodes if item.op == "HeadsAttention").input(3)
    assert mask is not None
    assert mask.shape == (2, 1, 1, 6)  # a row for each sequence, not a matrix
    sums = [item for item in result.nodes if item.op == "AddLayerNorm" and item.outputs[1].name]
    assert len(sums) == (4 if first else 0) - first  # the last one's sum nobody reads


def test_images() -> None:
    x = torch.randn(2, 3, 16, 16)
    _, ops = lowered(graph_of(Images(), x), x)
    assert ops["FusedConv"] == 4
    assert ops["ConvTranspose"] == 1


@pytest.mark.parametrize("first", [False, True])
def test_a_transposed_convolution_writes_into_the_joined_image(first: bool) -> None:
    nodes = [
        node("ConvTranspose", "x w b", "up", strides=[2, 2]),
        node("Relu", "skip", "other"),
        node("Concat", "up other" if first else "other up", "y", axis=1),
    ]
    arrays = {"w": weights(4, 3, 2, 2), "b": weights(3)}
    graph = import_model(model(nodes, {"x": [2, 4, 3, 5], "skip": [2, 6, 6, 10]}, ["y"], arrays))
    optimise(graph)
    result, ops = lowered(graph, torch.randn(2, 4, 3, 5), torch.randn(2, 6, 6, 10))
    assert (ops["SpreadConcat"], ops["Concat"], ops["ConvTranspose"]) == (1, 0, 0)
    assert result.nodes[-1].output.shape == (2, 9, 6, 10)


def test_open_dimensions_must_be_named() -> None:
    graph = graph_of(Encoder(False), *encoder_inputs(), open_batch=True)
    with pytest.raises(InputError, match="open dimensions"):
        input_shapes(graph, {"x0": (2, 6)})


def attention(mask: str, nodes: list[object], constants: dict[str, object], shape: list[int]) -> Graph:
    made = [
        *nodes,
        node("MatMul", "q k", "scores"),
        node("Add", f"scores {mask}", "masked"),
        node("Softmax", "masked", "p", axis=-1),
        node("MatMul", "p v", "y"),
    ]
    inputs = {"q": [1, 2, 3, 4], "k": [1, 2, 4, 3], "v": [1, 2, 3, 4], **({"m": shape} if shape else {})}
    graph = import_model(model(made, inputs, ["y"], constants))  # type: ignore[arg-type]
    optimise(graph)
    return graph


def test_a_mask_of_zeros_is_none() -> None:
    given = [torch.randn(1, 2, *rest) for rest in ((3, 4), (4, 3), (3, 4))]
    graph = attention("c", [], {"c": weights(1, 1, 3, 3) * 0}, [])
    result, ops = lowered(graph, *given)
    assert ops["ScaledDotProductAttention"] == 1
    assert result.nodes[-1].input(3) is None
    graph = attention("c", [], {"c": weights(1, 1, 3, 3)}, [])
    result, _ = lowered(graph, *given)
    assert result.nodes[-1].input(3) is not None


def test_a_sum_that_the_caller_wants_stays() -> None:
    nodes = [node("Add", "a b", "s"), node("LayerNormalization", "s w", "n", axis=-1), node("Relu", "n", "y")]
    graph = import_model(model(nodes, {"a": [2, 8], "b": [2, 8]}, ["y", "s"], {"w": weights(8)}))
    optimise(graph)
    result, ops = lowered(graph, torch.randn(2, 8), torch.randn(2, 8))
    assert ops["Add"] == 0
    assert next(item for item in result.nodes if item.op == "AddLayerNorm").outputs[1].name == "s"


def test_a_norm_over_two_axes_stays() -> None:
    nodes = [node("Add", "a b", "s"), node("LayerNormalization", "s w", "y", axis=1)]
    graph = import_model(model(nodes, {"a": [2, 3, 8], "b": [2, 3, 8]}, ["y"], {"w": weights(3, 8)}))
    optimise(graph)
    _, ops = lowered(graph, torch.randn(2, 3, 8), torch.randn(2, 3, 8))
    assert ops["LayerNormalization"] == 1


@pytest.mark.parametrize("first", [False, True])
def test_float8_rounds_in_the_kernel_before(first: bool) -> None:
    inputs = encoder_inputs()
    graph = graph_of(Encoder(first), *inputs)
    shapes = {value.name: x.shape for value, x in zip(graph.inputs, inputs, strict=True)}
    largest: dict[str, float] = {}
    with torch.inference_mode():
        calibrate(lower(graph, shapes), list(inputs), Target(torch.device("cpu"), torch.float32), largest)
        assert len(largest) == 8
        result = to_fp8(lower(graph, shapes), largest)
        ops = Counter(item.op for item in result.nodes)
        assert ops["Fp8Linear"] == 8
        assert ops["Linear"] == 0
        assert ops["QuantizeFp8"] == (0 if first else 1)  # the embedding has no kernel that could do it
        plain = [item for item in result.nodes if item.op == "AddLayerNorm" and item.outputs[0].name]
        assert len(plain) == (1 if first else 5)  # before the sums, only the last norm is read as it is
        (ours,), (theirs,) = Program(result).run(*inputs), Program(graph).run(*inputs)
    assert (ours - theirs).norm() < 0.08 * theirs.norm()
