"""Damaged and hostile model files: an error of one line each, no crash, nothing read outside the model's folder."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import trine.graph as tg
from tests.graph.models import model, node, weights
from trine.core.errors import TrineError


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
        plan.run({value.name: np.zeros([1, 3, 8, 8], np.float32) for value in plan.graph.inputs})
    except TrineError as error:
        return error.message
    return None


def test_the_network_itself_is_fine() -> None:
    result = tg.build(network(), tune=False).run({"x": np.ones((1, 3, 8, 8), np.float32)})
    assert result["y"].shape == (1, 5)


@pytest.mark.parametrize("seed", range(500))
def test_mutated_bytes_never_crash(seed: int) -> None:
    """Truncated, overwritten or doubled anywhere: the file is refused, or is still a model and runs."""
    rng = random.Random(seed)
    data = bytearray(network().SerializeToString())
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data))
        kind = rng.randrange(4)
        if kind == 0:
            del data[place:]
            data = data or bytearray(b"\0")
        elif kind == 1:
            data[place] = rng.randrange(256)
        elif kind == 2:
            data[place:place] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
        else:
            del data[place : place + rng.randint(1, 30)]
            data = data or bytearray(b"\0")
    assert "\n" not in (outcome(bytes(data)) or "")


@pytest.mark.parametrize("seed", range(400))
def test_mutated_fields_never_crash(seed: int) -> None:
    """A well-formed file that says something else: other operators, names, types, shapes, attributes."""
    rng = random.Random(seed)
    made = network()
    graph = made.graph
    for _ in range(rng.randint(1, 3)):
        chosen = rng.choice(graph.node)
        weight = rng.choice(graph.initializer)
        kind = rng.randrange(8)
        if kind == 0:
            chosen.op_type = rng.choice(
                ["Conv", "MatMul", "Softmax", "LSTM", "Loop", "Reshape", "Resize", "If", "TopK", ""]
            )
        elif kind == 1 and chosen.input:
            chosen.input[rng.randrange(len(chosen.input))] = rng.choice(["y", "x", "c", "w", "", "nobody"])
        elif kind == 2:
            weight.data_type = rng.randrange(-1, 28)
        elif kind == 3:
            del weight.dims[:]
            weight.dims.extend(rng.choice([[1 << 62], [-1, 4], [], [0], [1 << 31, 1 << 31, 1 << 31], [2, 2]]))
        elif kind == 4:
            value = rng.choice([1 << 40, -5, [0, 0], [1 << 33] * 4, 2.5, "text", [-9] * 4])
            name = rng.choice(["pads", "axis", "group", "kernel_shape"])
            chosen.attribute.append(helper.make_attribute(name, value))
        elif kind == 5 and chosen.attribute:
            attribute = rng.choice(chosen.attribute)
            attribute.ints[:] = [rng.choice([0, -1, 1 << 35, 3]) for _ in attribute.ints]
            attribute.i = rng.choice([0, -7, 1 << 50])
        elif kind == 6:
            graph.node.extend([graph.node[rng.randrange(len(graph.node))]])
        else:
            graph.input[0].type.tensor_type.elem_type = rng.randrange(0, 28)
    assert "\n" not in (outcome(made) or "")


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
    broken.graph.initializer[0].dims[0] = 1 << 40
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
