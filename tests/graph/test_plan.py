"""Plans: files, interface, dynamic shapes, several threads, refit, memory."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import trine.graph as tg
from tests.graph.models import model, node, weights
from trine.core.errors import ConfigurationError
from trine.graph.importer import import_model
from trine.graph.ir import Graph, Node, Value
from trine.graph.memory import memory_use


def network() -> onnx.ModelProto:
    """A convolution with an open batch, a loop, strings and a scalar among its parts."""
    return model(
        [
            node("Conv", "x w b", "c", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            node("Relu", "c", "r"),
            node("GlobalAveragePool", "r", "p"),
            node("Flatten", "p", "f"),
            node("MatMul", "f m", "y"),
        ],
        {"x": ["n", 3, 8, 8]},
        ["y"],
        {"w": weights(4, 3, 3, 3), "b": weights(4), "m": weights(4, 5)},
    )


def image(batch: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((batch, 3, 8, 8)).astype(np.float32)


def expected(made: onnx.ModelProto, inputs: dict[str, Any]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


@pytest.mark.parametrize("tune", [True, False])
def test_one_plan_takes_every_batch_size(tune: bool) -> None:
    plan = tg.build(network(), tune=tune)
    for batch in (1, 3, 7):
        np.testing.assert_allclose(
            plan.run({"x": image(batch)})["y"], expected(network(), {"x": image(batch)}), rtol=1e-4, atol=1e-5
        )


def test_a_saved_plan_gives_the_same_answers(tmp_path: Path) -> None:
    plan = tg.build(network())
    plan.save(tmp_path / "m.plan")
    loaded = tg.load_plan(tmp_path / "m.plan")
    np.testing.assert_allclose(loaded.run({"x": image(2)})["y"], plan.run({"x": image(2)})["y"], rtol=1e-5, atol=1e-7)
    assert loaded.inspect()["layers"] == plan.inspect()["layers"]
    assert [path.name for path in tmp_path.iterdir()] == ["m.plan"]


def test_subgraphs_and_attributes_of_every_kind_are_saved(tmp_path: Path) -> None:
    body = onnx.helper.make_graph(
        [node("Add", "total w", "next"), node("Identity", "going", "still")],
        "body",
        [
            onnx.helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []),
            onnx.helper.make_tensor_value_info("going", onnx.TensorProto.BOOL, []),
            onnx.helper.make_tensor_value_info("total", onnx.TensorProto.FLOAT, [2]),
        ],
        [
            onnx.helper.make_tensor_value_info("still", onnx.TensorProto.BOOL, []),
            onnx.helper.make_tensor_value_info("next", onnx.TensorProto.FLOAT, [2]),
        ],
    )
    fill = onnx.helper.make_tensor("fill", onnx.TensorProto.FLOAT, [1], [3.0])
    nodes = [
        node("Shape", "x", "s"),
        node("ConstantOfShape", "s", "start", value=fill),
        node("Loop", "n . start", "y", body=body),
    ]
    made = model(nodes, {"x": ["d"]}, ["y"], {"w": weights(2), "n": np.int64(3)})
    tg.build(made).save(tmp_path / "m.plan")
    result = tg.load_plan(tmp_path / "m.plan").run({"x": np.zeros(2, np.float32)})["y"]
    np.testing.assert_allclose(result, 3 + 3 * weights(2), rtol=1e-5)


@pytest.mark.parametrize("damage", ["cut", "header", "digit", "magic", "empty", "weights"])
def test_a_damaged_plan_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "m.plan"
    tg.build(network(), tune=False).save(path)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[:100]
    elif damage == "header":
        data[40:44] = b"\xff\xfe{{"
    elif damage == "digit":  # still JSON, of another meaning
        data[data.index(b'"nodes":') + 2] ^= 1
    elif damage == "magic":
        data[:4] = b"ONNX"
    elif damage == "empty":
        data = bytearray()
    else:
        data = data[:-200]
    path.write_bytes(data)
    with pytest.raises(tg.PlanError) as caught:
        tg.load_plan(path)
    assert "\n" not in caught.value.message


def test_a_weight_offset_outside_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.plan"
    tg.build(network(), tune=False).save(path)
    data = path.read_bytes()
    length = int.from_bytes(data[8:16], "little")
    header = json.loads(data[32 : 32 + length])
    header["weights"][0]["offset"] = 1 << 40
    text = json.dumps(header).encode()
    digest = hashlib.blake2b(text, digest_size=16).digest()
    path.write_bytes(data[:8] + len(text).to_bytes(8, "little") + digest + text + data[32 + length :])
    with pytest.raises(tg.PlanError, match="damaged"):
        tg.load_plan(path)


def test_several_threads_share_a_plan() -> None:
    plan = tg.build(network())
    alone = [plan.run({"x": image(2, seed)})["y"] for seed in range(8)]
    results: dict[int, np.ndarray[Any, Any]] = {}

    def work(seed: int) -> None:
        for _ in range(5):
            results[seed] = plan.run({"x": image(2, seed)})["y"]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, wanted in enumerate(alone):
        np.testing.assert_array_equal(results[seed], wanted)


def test_outputs_belong_to_the_caller() -> None:
    made = model([node("Identity", "x", "y"), node("Identity", "k", "z")], {"x": [2]}, ["y", "z"], {"k": weights(2)})
    plan = tg.build(made)
    x = np.ones(2, np.float32)
    first = plan.run({"x": x})
    first["y"][:] = 7
    first["z"][:] = 7
    assert x.tolist() == [1, 1]
    np.testing.assert_array_equal(plan.run({"x": x})["z"], weights(2))


def test_refit_swaps_a_weight_by_its_name() -> None:
    plan = tg.build(network())
    other = network()
    other.graph.initializer[2].CopyFrom(onnx.numpy_helper.from_array(weights(4, 5, seed=9), "m"))
    plan.refit({"m": weights(4, 5, seed=9)})
    np.testing.assert_allclose(plan.run({"x": image(2)})["y"], expected(other, {"x": image(2)}), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigurationError, match="no weight 'q'"):
        plan.refit({"q": weights(1)})
    with pytest.raises(ConfigurationError, match="must be"):
        plan.refit({"b": weights(9)})


def test_the_timing_cache_is_read_again(tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "times.json"
    first = tg.build(network(), timing_cache=cache).inspect()
    assert tg.build(network(), timing_cache=cache).inspect()["layers"] == first["layers"]
    cache.write_text("{not json")
    tg.build(network(), timing_cache=cache)
    assert json.loads(cache.read_text())["times"]


def test_a_chosen_tactic_is_timed_against_the_reference() -> None:
    layers = tg.build(network(), shapes={"x": [2, 3, 8, 8]}).inspect()["layers"]
    conv = next(layer for layer in layers if layer["op"] == "FusedConv")
    assert conv["tactic"] in conv["times_ms"]
    assert conv["tactic"] == min(conv["times_ms"], key=conv["times_ms"].get)
    linear = next(layer for layer in layers if layer["op"] == "Linear")
    assert (linear["tactic"], linear["times_ms"]) == ("native", {})  # there is nothing else to choose


def test_memory_counts_what_lives_at_once() -> None:
    graph = Graph(inputs=[Value("x", tg.api.DType.FLOAT32, (4,))])
    last = graph.inputs[0]
    for index in range(5):
        made = Node("Relu", [last], [Value(f"v{index}", last.dtype, (4,))])
        graph.nodes.append(made)
        last = made.output
    graph.outputs = [last]
    use = memory_use(graph)
    assert use is not None
    assert (use.total, use.peak) == (80, 32)


def test_the_verifier_finds_each_broken_rule() -> None:
    def graph() -> Graph:
        return import_model(network())

    broken = graph()
    broken.nodes.reverse()
    with pytest.raises(tg.VerificationError, match="before it is computed"):
        broken.verify()
    broken = graph()
    broken.nodes[1].output.name = broken.nodes[0].output.name
    with pytest.raises(tg.VerificationError, match="two values are called"):
        broken.verify()
    broken = graph()
    broken.nodes.append(broken.nodes[0])
    with pytest.raises(tg.VerificationError, match="defined twice"):
        broken.verify()
    broken = graph()
    broken.constants()[0].shape = (1,)
    with pytest.raises(tg.VerificationError, match="says shape"):
        broken.verify()
    broken = graph()
    broken.nodes[0].output.producer = None
    with pytest.raises(tg.VerificationError, match="another producer"):
        broken.verify()


def test_a_torch_module_is_built_through_onnx() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU()).eval()
    x = torch.randn(2, 8)
    plan = tg.build(module, args=(x,))
    (result,) = plan.run({plan.graph.inputs[0].name: x}).values()
    np.testing.assert_allclose(result, module(x).detach().numpy(), rtol=1e-4, atol=1e-6)
