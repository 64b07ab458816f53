"""Damaged and hostile model files: an error of one line each, no crash, nothing read outside the model's folder."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import trine.graph as tg
from tests.graph.models import model, node, weights
from tests.graph.mutations import MODELS, mutated
from trine.core.errors import TrineError
from trine.graph.ir import Value


def network() -> onnx.ModelProto:
    return model(
        [
            node("Conv", "x w b", "c", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            node("Relu", "c", "r"),
            node("GlobalAveragePool", "r", "p"),
            node("Flatten", "p", "f"),
            node("Gemm", "f m n", "y", transB=1),
        ],
        {"x": [1, 3, 8, 8]},
        ["y"],
        {"w": weights(4, 3, 3, 3), "b": weights(4), "m": weights(5, 4), "n": weights(5)},
    )


def refuses(source: onnx.ModelProto | bytes | Path) -> str:
    """The message of the error that building and running gives."""
    message = outcome(source)
    assert message is not None
    return message


def outcome(source: onnx.ModelProto | bytes | Path) -> str | None:
    """The error's message, which is one line; None where the model builds and runs. Other exceptions pass through."""
    try:
        plan = tg.build(source, tune=False)
        plan.run({value.name: _zeros(value) for value in plan.graph.inputs})
    except TrineError as error:
        return error.message
    return None


def _zeros(value: Value) -> np.ndarray[Any, Any]:
    """Of the input's shape; a huge dimension is 99, which is an error of its own."""
    shape = [min(dim, 99) if isinstance(dim, int) else 2 for dim in value.shape or ()]
    dtype = np.dtype(np.float32) if value.dtype is None else value.dtype.numpy
    return np.full(shape, "a", object) if dtype.kind == "O" else np.zeros(shape, dtype)


def test_the_network_itself_is_fine() -> None:
    result = tg.build(network(), tune=False).run({"x": np.ones((1, 3, 8, 8), np.float32)})
    assert result["y"].shape == (1, 5)


@pytest.mark.parametrize("made", MODELS)
def test_the_models_that_are_mutated_are_fine(made: onnx.ModelProto) -> None:
    assert outcome(made) is None


@pytest.mark.timeout(240)
@pytest.mark.parametrize("start", range(0, 1500, 250))
def test_mutated_models_never_crash(start: int) -> None:
    """A file is refused in one line, or is still a model and runs. TRINE_FUZZ_SEED moves on to other files."""
    first = start + int(os.environ.get("TRINE_FUZZ_SEED", "0"))
    for seed in range(first, first + 250):
        message = outcome(mutated(seed)) or ""
        assert "\n" not in message, seed
        assert len(message) < 1000, seed


def test_a_cycle_is_named() -> None:
    broken = model([node("Relu", "b", "a"), node("Relu", "a", "b")], {"x": [1, 3, 8, 8]}, ["b"])
    assert "cyclic" in refuses(broken)


def test_a_name_made_twice_is_named() -> None:
    assert "defined twice" in refuses(model([node("Relu", "x", "y"), node("Abs", "x", "y")], {"x": [1]}, ["y"]))


def test_operands_of_different_types_are_refused() -> None:
    broken = model([node("Add", "x k", "y")], {"x": [1, 3, 8, 8]}, ["y"], {"k": np.ones(8, np.int64)})
    assert "types float32 and int64" in refuses(broken)


def test_an_unknown_attribute_is_refused() -> None:
    assert "no attribute 'speed'" in refuses(model([node("Relu", "x", "y", speed=2.0)], {"x": [1]}, ["y"]))


def test_an_unknown_operator_is_named() -> None:
    made = model([node("Frobnicate", "x", "y", name="it")], {"x": [1]}, ["y"])
    with pytest.raises(tg.UnsupportedOperatorError, match=r"'it'.*Frobnicate"):
        tg.build(made)


def test_a_weight_shorter_than_its_shape_is_named() -> None:
    broken = network()
    broken.graph.initializer[0].dims[0] = 1 << 16
    assert "bytes of data, expected" in refuses(broken)


def test_a_huge_constant_is_refused_not_allocated() -> None:
    shape = np.array([1 << 20, 1 << 20, 1 << 20], np.int64)
    refuses(model([node("ConstantOfShape", "s", "k"), node("Add", "x k", "y")], {"x": [1]}, ["y"], {"s": shape}))


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "link.bin", "", "a/../../secret.bin", "."])
def test_external_data_stays_in_the_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    tensor = TensorProto(name="k", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    made = model([node("Add", "x k", "y")], {"x": [4]}, ["y"])
    made.graph.initializer.append(tensor)
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    assert "not in the model's folder" in refuses(folder / "model.onnx")


def test_external_data_beside_the_model_is_read(tmp_path: Path) -> None:
    made = model([node("Add", "x k", "y")], {"x": [4]}, ["y"], {"k": np.arange(4, dtype=np.float32)})
    onnx.save(made, tmp_path / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    plan = tg.build(tmp_path / "model.onnx")
    np.testing.assert_array_equal(plan.run({"x": np.ones(4, np.float32)})["y"], np.arange(4) + 1)


@pytest.mark.parametrize(("key", "value"), [("offset", "9"), ("length", "99"), ("offset", "-4"), ("length", "many")])
def test_external_data_outside_its_file_is_refused(tmp_path: Path, key: str, value: str) -> None:
    made = model([node("Add", "x k", "y")], {"x": [4]}, ["y"], {"k": np.arange(4, dtype=np.float32)})
    onnx.save(made, tmp_path / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    made = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    entries = made.graph.initializer[0].external_data
    entry = next((item for item in entries if item.key == key), None) or entries.add(key=key)
    entry.value = value
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    refuses(tmp_path / "model.onnx")


def test_a_function_that_calls_itself_is_refused() -> None:
    body = [helper.make_node("loop", ["x"], ["y"], domain="own")]
    function = helper.make_function("own", "loop", ["x"], ["y"], body, [helper.make_opsetid("own", 1)])
    made = model([helper.make_node("loop", ["x"], ["y"], domain="own")], {"x": [1]}, ["y"])
    made.functions.append(function)
    made.opset_import.append(helper.make_opsetid("own", 1))
    assert "calls itself" in refuses(made)


def calls(depth: int, count: int) -> onnx.ModelProto:
    """Functions f0 … where each calls the one before `count` times."""
    made = model([helper.make_node(f"f{depth - 1}", ["x"], ["y"], domain="own")], {"x": [1]}, ["y"])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    for level in range(depth):
        names = ["x", *(f"t{i}" for i in range(count - 1)), "y"]
        kind = {"domain": "own"} if level else {}
        op = f"f{level - 1}" if level else "Relu"
        body = [helper.make_node(op, [a], [b], **kind) for a, b in itertools.pairwise(names)]
        made.functions.append(helper.make_function("own", f"f{level}", ["x"], ["y"], body, imports))
    made.opset_import.append(imports[1])
    return made


def test_functions_that_multiply_are_refused() -> None:
    assert outcome(calls(6, 3)) is None
    assert "larger than 100000 nodes" in refuses(calls(60, 2))


def test_deeply_nested_branches_are_refused_or_run() -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph([node("Relu", "x", "out0")], "g0", [], [value("out0", TensorProto.FLOAT, None)])
    other = helper.make_graph([node("Abs", "x", "z")], "other", [], [value("z", TensorProto.FLOAT, None)])
    for level in range(1, 30):  # what the file format itself allows
        made = [node("If", "yes", f"out{level}", then_branch=graph, else_branch=other)]
        graph = helper.make_graph(made, f"g{level}", [], [value(f"out{level}", TensorProto.FLOAT, None)])
    whole = model(list(graph.node), {"x": [2]}, ["out29"], {"yes": np.array(True)})
    assert "\n" not in (outcome(whole) or "")


@pytest.mark.parametrize(("count", "condition"), [(".", "yes"), ("many", "yes"), ("many", "."), (".", ".")])
def test_a_loop_that_never_ends_is_refused(count: str, condition: str) -> None:
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [node("Add", "a x", "b"), node("Identity", "c", "d")],
        "body",
        [value("i", TensorProto.INT64, []), value("c", TensorProto.BOOL, []), value("a", TensorProto.FLOAT, [1])],
        [value("d", TensorProto.BOOL, []), value("b", TensorProto.FLOAT, [1])],
    )
    weights_ = {"yes": np.array(True), "many": np.int64(1 << 60)}
    made = model([node("Loop", f"{count} {condition} x", "y", body=body)], {"x": [1]}, ["y"], weights_)
    assert "its condition is always true" in refuses(made)


@pytest.mark.parametrize(
    ("op", "extra"),
    [("Expand", ""), ("Tile", ""), ("ConstantOfShape", ""), ("Resize", ". . "), ("Reshape", "")],
)
def test_a_size_that_only_a_run_knows_takes_no_memory(op: str, extra: str) -> None:
    """The shape is an input: terabytes are refused when they are asked for."""
    inputs = "s" if op == "ConstantOfShape" else f"x {extra}s"
    made = model([node(op, inputs, "y")], {"x": [1, 1, 1]}, ["y"])
    made.graph.input.append(helper.make_tensor_value_info("s", TensorProto.INT64, [3]))
    plan = tg.build(made, tune=False)
    given = {"x": np.ones((1, 1, 1), np.float32), "s": np.array([1 << 20, 1 << 20, 4], np.int64)}
    with pytest.raises(tg.ExecutionError):
        plan.run({name: given[name] for name in (value.name for value in plan.graph.inputs)})


def test_tensors_without_elements_are_no_division_by_zero() -> None:
    nodes = [
        node("GlobalAveragePool", "x", "g"),
        node("Softmax", "x", "s", axis=2),
        node("ReduceMean", "s", "m", axes=[2]),
        node("Relu", "s", "r"),
    ]
    plan = tg.build(model(nodes, {"x": [1, 3, 0, 8]}, ["g", "m", "r"]), tune=False)
    found = plan.run({"x": np.ones((1, 3, 0, 8), np.float32)})
    assert [found[name].shape for name in "gmr"] == [(1, 3, 1, 1), (1, 3, 1, 8), (1, 3, 0, 8)]


def test_inputs_that_do_not_fit_are_named() -> None:
    plan = tg.build(network(), tune=False)
    with pytest.raises(tg.InputError, match=r"'x' has shape \[1, 3, 8\]; it must be \[1, 3, 8, 8\]"):
        plan.run({"x": np.zeros((1, 3, 8), np.float32)})
    with pytest.raises(tg.InputError, match="float64; it must be float32"):
        plan.run({"x": np.zeros((1, 3, 8, 8))})
    with pytest.raises(tg.InputError, match="no input is called 'z'"):
        plan.run({"z": np.zeros(1)})
    with pytest.raises(tg.InputError, match="'x' is missing"):
        plan.run({})


def test_weights_in_the_old_fields_are_read() -> None:
    made = model([node("Add", "x k", "y")], {"x": [2]}, ["y"])
    made.graph.initializer.append(helper.make_tensor("k", TensorProto.FLOAT, [2], [1.0, 2.0]))
    assert not made.graph.initializer[0].raw_data
    assert numpy_helper.to_array(made.graph.initializer[0]).tolist() == [1, 2]
    np.testing.assert_array_equal(tg.build(made).run({"x": np.zeros(2, np.float32)})["y"], [1, 2])
