"""Each pass does what it says on a small graph, leaves alone what it must, and never changes the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

import trine.graph as tg
from tests.graph.models import model, node, weights
from trine.core.errors import ConfigurationError
from trine.graph.importer import import_model
from trine.graph.ir import Graph
from trine.graph.passes import PASSES, optimise
from trine.graph.shapes import infer_shapes

SCALAR = {"two": np.float32(2), "half": np.float32(0.5), "one": np.float32(1), "root2": np.float32(np.sqrt(2))}


def pass_named(name: str) -> Callable[[Graph], Graph]:
    return next(item for item in PASSES if item.__name__ == name)


def after(made: onnx.ModelProto, *names: str) -> Counter[str]:
    """The operators left after the named passes; the whole optimiser must keep the model's result."""
    graph = import_model(made)
    optimise(graph, [infer_shapes, *(pass_named(name) for name in names)])
    same_result(made)
    return Counter(item.op for item in graph.nodes)


def same_result(made: onnx.ModelProto) -> None:
    inputs: dict[str, Any] = {}
    for index, value in enumerate(import_model(made).inputs):
        shape = [dim if isinstance(dim, int) else 2 for dim in value.shape or ()]
        inputs[value.name] = weights(*shape, seed=index + 1) * 5
    plain, fast = tg.build(made, optimise=False).run(inputs), tg.build(made).run(inputs)
    for name, expected in plain.items():
        np.testing.assert_allclose(fast[name], expected, rtol=1e-4, atol=1e-5)


def test_fold_constants_computes_what_needs_no_input() -> None:
    made = model(
        [node("Add", "a b", "c"), node("Mul", "x c", "y")], {"x": [2]}, ["y"], {"a": weights(2), "b": weights(2)}
    )
    assert after(made, "fold_constants") == {"Mul": 1}


def test_fold_constants_reads_static_shapes() -> None:
    made = model(
        [node("Shape", "x", "s"), node("Reshape", "w s", "r"), node("Add", "x r", "y")],
        {"x": [2, 3]},
        ["y"],
        {"w": weights(6)},
    )
    assert after(made, "fold_constants") == {"Add": 1}


def test_fold_constants_keeps_random_numbers_and_integers_of_a_quantised_model() -> None:
    made = model(
        [node("DequantizeLinear", "q s", "w"), node("Add", "x w", "y")],
        {"x": [2]}, ["y"], {"q": np.array([1, 2], np.int8), "s": np.float32(0.5)},
    )  # fmt: skip
    assert after(made, "fold_constants") == {"DequantizeLinear": 1, "Add": 1}


def test_remove_dead_nodes() -> None:
    made = model([node("Relu", "x", "y"), node("Exp", "x", "unused")], {"x": [2]}, ["y"])
    assert after(made, "remove_dead_nodes") == {"Relu": 1}


def test_merge_common_subexpressions_merges_equal_nodes_only() -> None:
    nodes = [
        node("Exp", "x", "a"),
        node("Exp", "x", "b"),
        node("LeakyRelu", "x", "c", alpha=0.1),
        node("LeakyRelu", "x", "d", alpha=0.2),
    ]
    made = model([*nodes, node("Sum", "a b c d", "y")], {"x": [2]}, ["y"])
    assert after(made, "merge_common_subexpressions") == {"Exp": 1, "LeakyRelu": 2, "Sum": 1}


def test_simplify_removes_what_changes_nothing() -> None:
    nodes = [
        node("Identity", "x", "a"),
        node("Mul", "a one", "b"),
        node("Cast", "b", "c", to=1),
        node("Relu", "c", "y"),
    ]
    assert after(model(nodes, {"x": [2]}, ["y"], SCALAR), "simplify") == {"Relu": 1}


def test_simplify_keeps_a_multiplication_by_one_that_widens() -> None:
    made = model([node("Mul", "x k", "y")], {"x": [2]}, ["y"], {"k": np.ones((1, 1), np.float32)})
    assert after(made, "simplify") == {"Mul": 1}


def test_cancel_transposes() -> None:
    nodes = [
        node("Transpose", "x", "a", perm=[0, 2, 1]),
        node("Transpose", "a", "b", perm=[0, 2, 1]),
        node("Relu", "b", "y"),
    ]
    assert after(model(nodes, {"x": [2, 3, 4]}, ["y"]), "cancel_transposes", "simplify") == {"Relu": 1}


GELU = [
    node("Div", "x root2", "d"),
    node("Erf", "d", "e"),
    node("Add", "e one", "p"),
    node("Mul", "x p", "m"),
    node("Mul", "m half", "y"),
]


def test_fuse_gelu() -> None:
    assert after(model(GELU, {"x": [3, 4]}, ["y"], SCALAR), "fuse_gelu") == {"Gelu": 1}


def test_fuse_gelu_leaves_other_numbers_alone() -> None:
    other = model(GELU, {"x": [3, 4]}, ["y"], {**SCALAR, "half": np.float32(0.4)})
    assert "Gelu" not in after(other, "fuse_gelu")


def test_fuse_silu_though_the_logistic_is_read_elsewhere() -> None:
    made = model([node("Sigmoid", "x", "s"), node("Mul", "x s", "y")], {"x": [3, 4]}, ["y", "s"])
    assert after(made, "fuse_silu") == {"Sigmoid": 1, "Swish": 1}


NORM = [
    node("ReduceMean", "x", "m", axes=[-1]), node("Sub", "x m", "c"), node("Pow", "c two", "q"),
    node("ReduceMean", "q", "v", axes=[-1]), node("Add", "v eps", "w"), node("Sqrt", "w", "r"),
    node("Div", "c r", "n"), node("Mul", "n scale", "o"), node("Add", "o bias", "y"),
]  # fmt: skip
NORM_WEIGHTS = {**SCALAR, "eps": np.float32(1e-5), "scale": weights(8), "bias": weights(8, seed=1)}


def test_fuse_layer_norm() -> None:
    assert after(model(NORM, {"x": ["n", 8]}, ["y"], NORM_WEIGHTS), "fuse_layer_norm") == {"LayerNormalization": 1}


def test_fuse_layer_norm_needs_a_scale_along_the_row() -> None:
    found = after(model(NORM, {"x": [8, 8]}, ["y"], {**NORM_WEIGHTS, "scale": weights(8, 1)}), "fuse_layer_norm")
    assert "LayerNormalization" not in found


def test_fuse_rms_norm() -> None:
    nodes = [
        node("Mul", "x x", "q"), node("ReduceMean", "q", "v", axes=[1]), node("Add", "v eps", "w"),
        node("Sqrt", "w", "r"), node("Div", "x r", "n"), node("Mul", "scale n", "y"),
    ]  # fmt: skip
    assert after(model(nodes, {"x": [3, 8]}, ["y"], NORM_WEIGHTS), "fuse_rms_norm") == {"RMSNormalization": 1}


def convolution(*tail: onnx.NodeProto, outputs: tuple[str, ...] = ("y",)) -> onnx.ModelProto:
    parameters = {
        "w": weights(3, 3, 3, 3),
        "s": weights(3) + 1,
        "b": weights(3),
        "m": weights(3),
        "v": weights(3) ** 2 + 1,
    }
    first = node("Conv", "x w", "c", pads=[1, 1, 1, 1])
    return model([first, *tail], {"x": [1, 3, 6, 6]}, list(outputs), parameters)


def test_fold_batch_norm_into_the_convolution() -> None:
    assert after(convolution(node("BatchNormalization", "c s b m v", "y")), "fold_batch_norm") == {"Conv": 1}


def test_fold_batch_norm_keeps_a_convolution_that_is_read_elsewhere() -> None:
    made = convolution(node("BatchNormalization", "c s b m v", "y"), outputs=("y", "c"))
    assert after(made, "fold_batch_norm") == {"Conv": 1, "BatchNormalization": 1}


def test_fold_batch_norm_into_a_transposed_convolution_and_a_product() -> None:
    parameters = {"w": weights(3, 4, 2, 2), "p": weights(24, 5), "e": weights(5)}
    for size in (4, 5):
        parameters |= {f"{name}{size}": weights(size, seed=seed) for seed, name in enumerate("sbm")}
        parameters[f"v{size}"] = weights(size) ** 2 + 1
    nodes = [
        node("ConvTranspose", "x w", "c", strides=[2, 2]), node("BatchNormalization", "c s4 b4 m4 v4", "n"),
        node("ReduceMean", "n", "r", axes=[3], keepdims=0), node("Flatten", "r", "f"), node("Gemm", "f p e", "g"),
        node("BatchNormalization", "g s5 b5 m5 v5", "y"),
    ]  # fmt: skip
    made = model(nodes, {"x": [2, 3, 3, 3]}, ["y"], parameters)
    assert after(made, "fold_batch_norm") == {"ConvTranspose": 1, "ReduceMean": 1, "Flatten": 1, "Gemm": 1}


def test_lower_batch_norm_to_elementwise_operators() -> None:
    made = convolution(node("BatchNormalization", "c s b m v", "y"), outputs=("y", "c"))
    assert after(made, "fold_batch_norm", "lower_batch_norm") == {"Conv": 1, "Mul": 1, "Add": 1}


def test_fuse_convolution_takes_the_residual_and_the_activation() -> None:
    made = convolution(node("Add", "x c", "a"), node("Relu", "a", "y"))
    assert after(made, "fuse_convolution") == {"FusedConv": 1}


def test_lift_convolution_over_one_dimension() -> None:
    attributes = {"strides": [2], "pads": [1, 2], "dilations": [2], "group": 2}
    made = model(
        [node("Conv", "x w b", "y", **attributes)], {"x": [2, 4, 15]}, ["y"], {"w": weights(6, 2, 3), "b": weights(6)}
    )
    assert after(made, "lift_convolution", "fuse_convolution") == {"Unsqueeze": 1, "FusedConv": 1, "Squeeze": 1}


def test_fuse_convolution_leaves_a_sum_that_broadcasts() -> None:
    made = convolution(node("GlobalAveragePool", "x", "p"), node("Add", "c p", "y"))
    assert after(made, "fuse_convolution") == {"FusedConv": 1, "GlobalAveragePool": 1, "Add": 1}


def test_fuse_linear_takes_bias_residual_and_activation() -> None:
    nodes = [node("MatMul", "x w", "p"), node("Add", "b p", "q"), node("Add", "q x", "r"), node("Relu", "r", "y")]
    made = model(nodes, {"x": ["n", 5, 8]}, ["y"], {"w": weights(8, 8), "b": weights(8)})
    assert after(made, "fuse_linear") == {"Linear": 1}


def test_fuse_linear_from_gemm() -> None:
    made = model([node("Gemm", "x w b", "y", transB=1)], {"x": ["n", 8]}, ["y"], {"w": weights(4, 8), "b": weights(4)})
    assert after(made, "fuse_linear") == {"Linear": 1}


@pytest.mark.parametrize("masked", [True, False])
def test_fuse_attention(masked: bool) -> None:
    nodes = [node("Transpose", "k", "t", perm=[0, 1, 3, 2]), node("MatMul", "q t", "s"), node("Div", "s two", "d")]
    nodes += [node("Add", "d mask", "a")] if masked else [node("Identity", "d", "a")]
    nodes += [node("Softmax", "a", "p", axis=-1), node("MatMul", "p v", "y")]
    shape = ["b", 2, 5, 4]
    made = model(nodes, {"q": shape, "k": shape, "v": shape}, ["y"], {**SCALAR, "mask": weights(1, 1, 5, 5)})
    assert after(made, "simplify", "fuse_attention") == {"Transpose": 1, "ScaledDotProductAttention": 1}


QKV = {"q": weights(8, 6), "k": weights(8, 4, seed=1), "v": weights(8, 4, seed=2), "b": weights(6)}
PRODUCTS = [
    node("MatMul", "x q", "m"), node("Add", "m b", "a"), node("MatMul", "x k", "c"), node("MatMul", "x v", "d")
]  # fmt: skip


def test_merge_linear_multiplies_once_by_queries_keys_and_values() -> None:
    made = model([*PRODUCTS, node("Concat", "a c d", "y", axis=2)], {"x": ["n", 5, 8]}, ["y"], QKV)
    assert after(made, "fuse_linear", "merge_linear") == {"Linear": 1, "Split": 1, "Concat": 1}


def test_merge_linear_leaves_other_activations_and_inputs_alone() -> None:
    nodes = [node("MatMul", "x q", "m"), node("Relu", "m", "a"), node("MatMul", "x k", "c"), node("Abs", "x", "z")]
    made = model([*nodes, node("MatMul", "z v", "d")], {"x": ["n", 5, 8]}, ["a", "c", "d"], QKV)
    assert after(made, "fuse_linear", "merge_linear") == {"Linear": 3, "Abs": 1}


def test_merged_weights_are_refitted_by_their_own_names() -> None:
    made = model(PRODUCTS, {"x": ["n", 8]}, ["a", "c", "d"], QKV)
    other = {name: array + 1 for name, array in QKV.items() if name != "v"}
    expected = tg.build(model(PRODUCTS, {"x": ["n", 8]}, ["a", "c", "d"], {**QKV, **other}), optimise=False)
    plan = tg.build(made, tune=False)
    plan.refit(other)
    inputs = {"x": weights(3, 8, seed=5)}
    for name, array in expected.run(inputs).items():
        np.testing.assert_allclose(plan.run(inputs)[name], array, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigurationError, match=r"must be float32 \[8, 4\]"):
        plan.refit({"k": weights(8, 6)})


def test_every_node_knows_what_it_was_made_of() -> None:
    tail = [node("BatchNormalization", "c s b m v", "n", name="norm"), node("Identity", "n", "i", name="same")]
    made = convolution(*tail, node("Add", "x i", "a", name="sum"), node("Relu", "a", "y", name="act"))
    made.graph.node[0].name = "conv"
    graph = import_model(made)
    optimise(graph)
    (fused,) = graph.nodes
    assert sorted(fused.origins) == ["Add sum", "BatchNormalization norm", "Conv conv", "Identity same", "Relu act"]


def test_a_merged_product_is_made_of_all_of_them() -> None:
    nodes = [onnx.NodeProto.FromString(item.SerializeToString()) for item in PRODUCTS]
    for item in nodes:
        item.name = item.output[0]
    graph = import_model(model(nodes, {"x": ["n", 8]}, ["a", "c", "d"], QKV))
    optimise(graph)
    merged, split = graph.nodes
    assert set(merged.origins) == {"MatMul m", "Add a", "MatMul c", "MatMul d"}
    assert split.origins == ()


def test_merge_linear_joins_weights_that_two_layers_share_once() -> None:
    nodes = [node("MatMul", "x q", "a"), node("MatMul", "x k", "c"), node("Sin", "x", "z")]
    nodes += [node("MatMul", "z q", "d"), node("MatMul", "z k", "e")]
    made = model(nodes, {"x": ["n", 8]}, ["a", "c", "d", "e"], {name: QKV[name] for name in "qk"})
    assert after(made, "fuse_linear", "merge_linear") == {"Linear": 2, "Split": 2, "Sin": 1}
    assert tg.build(made).inspect()["weights"] == 8 * 10 * 4 + 2 * 2 * 8


@pytest.mark.parametrize("more", [True, False])
def test_fuse_attention_with_guarded_weights_and_two_masks(more: bool) -> None:
    """As exporters write torch's scaled_dot_product_attention; a row that its mask hides whole gives zeros."""
    nodes = [
        node("Mul", "q half", "a"),
        node("Transpose", "k", "t", perm=[0, 1, 3, 2]),
        node("Mul", "t half", "b"),
        node("MatMul", "a b", "s"),
        node("Add", "s mask", "u"),
        node("Add", "position u" if more else "u zero", "m"),
        node("Softmax", "m", "p", axis=-1),
        node("IsNaN", "p", "n"),
        node("Where", "n zero p", "w"),
        node("MatMul", "w v", "y"),
    ]
    mask = np.zeros((1, 1, 5, 5), np.float32)
    mask[0, 0, 2] = -np.inf
    mask[0, 0, 3, 1:] = -np.inf
    given = {**SCALAR, "mask": mask, "position": weights(1, 2, 5, 5), "zero": np.float32(0)}
    made = model(nodes, {name: ["b", 2, 5, 4] for name in "qkv"}, ["y"], given)
    found = after(made, "simplify", "fuse_attention", "fold_constants")
    assert found == {"Transpose": 1, "ScaledDotProductAttention": 1}
    inputs = {name: weights(3, 2, 5, 4, seed=9) for name in "qkv"}
    result = tg.build(made, tune=False).run(inputs)["y"]
    assert not result[:, :, 2].any()
    assert np.isfinite(result).all()


def test_fuse_silu_with_a_number_before_the_logistic() -> None:
    made = model(
        [node("Mul", "x k", "a"), node("Sigmoid", "a", "s"), node("Mul", "x s", "y")],
        {"x": [3, 4]}, ["y"], {"k": np.float32(1.702)},
    )  # fmt: skip
    assert after(made, "fuse_silu") == {"Swish": 1}


def test_fold_scale_into_the_product() -> None:
    nodes = [node("MatMul", "x w", "p"), node("Add", "p b", "q"), node("Mul", "q g", "r"), node("Add", "x r", "y")]
    given = {"w": weights(8, 8), "b": weights(8), "g": weights(8, seed=4)}
    assert after(model(nodes, {"x": ["n", 8]}, ["y"], given), "fuse_linear", "fold_scale") == {"Linear": 1}


def test_fold_scale_leaves_a_product_that_is_read_elsewhere_or_ends_in_an_activation() -> None:
    nodes = [node("MatMul", "x w", "p"), node("Relu", "p", "q"), node("Mul", "q g", "y")]
    made = model(nodes, {"x": ["n", 8]}, ["y"], {"w": weights(8, 8), "g": weights(8)})
    assert after(made, "fuse_linear", "fold_scale") == {"Linear": 1, "Mul": 1}
    made = model(
        [nodes[0], node("Mul", "p g", "y")], {"x": ["n", 8]}, ["y", "p"], {"w": weights(8, 8), "g": weights(8)}
    )
    assert after(made, "fuse_linear", "fold_scale") == {"Linear": 1, "Mul": 1}


def test_hoist_activations_through_what_moves_a_product() -> None:
    tail = [node("Flatten", "c", "f", axis=2), node("Transpose", "f", "t", perm=[1, 0]), node("Relu", "t", "y")]
    made = convolution(*tail)
    assert after(made, "hoist_activations", "fuse_convolution") == {"FusedConv": 1, "Flatten": 1, "Transpose": 1}
    kept = convolution(*tail, outputs=("y", "f"))
    found = after(kept, "hoist_activations", "fuse_convolution")
    assert found == {"FusedConv": 1, "Flatten": 1, "Transpose": 1, "Relu": 1}


@pytest.mark.parametrize(
    ("back", "left"), [([2, 3, 4, 5], {"Transpose": 1}), ([3, 2, 4, 5], {"Reshape": 2, "Transpose": 1})]
)
def test_unfold_transposes(back: list[int], left: dict[str, int]) -> None:
    nodes = [node("Reshape", "x s", "a"), node("Transpose", "a", "b", perm=[0, 2, 1]), node("Reshape", "b t", "y")]
    shapes = {"s": np.array([-1, 5, 4], np.int64), "t": np.array(back, np.int64)}
    assert after(model(nodes, {"x": [2, 3, 5, 4]}, ["y"], shapes), "unfold_transposes") == left


def test_fold_padding_lets_convolutions_pad() -> None:
    pads = {"amounts": np.array([0, 0, 1, 0, 0, 0, 2, 1]), "w": weights(4, 3, 3, 3)}
    made = model(
        [node("Pad", "x amounts", "p"), node("Conv", "p w", "y", pads=[0, 1, 0, 1])], {"x": [1, 3, 6, 6]}, ["y"], pads
    )
    assert after(made, "fold_padding") == {"Conv": 1}


@pytest.mark.parametrize("amounts", [[0, 1, 0, 0, 0, 0, 0, 0], [0, 0, -1, 0, 0, 0, 0, 0]])
def test_fold_padding_leaves_other_pads(amounts: list[int]) -> None:
    channels = 3 + amounts[1]
    given = {"amounts": np.array(amounts), "w": weights(4, channels, 3, 3)}
    made = model([node("Pad", "x amounts", "p"), node("Conv", "p w", "y")], {"x": [1, 3, 6, 6]}, ["y"], given)
    assert after(made, "fold_padding") == {"Pad": 1, "Conv": 1}
    given = {"amounts": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "w": weights(4, 3, 3, 3)}
    nodes = [node("Pad", "x amounts", "p"), node("Conv", "p w", "c"), node("MaxPool", "p", "y", kernel_shape=[3, 3])]
    assert after(model(nodes, {"x": [1, 3, 6, 6]}, ["c", "y"], given), "fold_padding")["Pad"] == 1
