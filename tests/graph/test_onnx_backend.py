"""ONNX's own backend tests: every model of the installed `onnx` gives the expected outputs, or a named error."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

import trine.graph as tg
from trine.graph.gpu.api import build
from trine.graph.gpu.registry import Target
from trine.graph.importer import import_model
from trine.graph.passes import optimise

SETS = ("simple", "pytorch-converted", "pytorch-operator", "node")

NOT_REPEATABLE = ("test_bernoulli",)
"""Random numbers without a seed, or with a seed whose generator ONNX does not name."""

ASIDE = ("ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training")
"""Domains that Trine refuses by name."""


def read(path: Path, kind: Any) -> Any:
    if kind.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(path.read_bytes()))
    if kind.HasField("optional_type"):
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(path.read_bytes()))
    return numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))


def as_array(item: Any) -> Any:
    return numpy_helper.to_array(item) if isinstance(item, onnx.TensorProto) else item


def data_sets(case: Any, model: onnx.ModelProto) -> Iterator[tuple[list[Any], list[Any]]]:
    if case.data_sets is not None:
        for inputs, outputs in case.data_sets:
            yield [as_array(item) for item in inputs], [as_array(item) for item in outputs]
        return
    for folder in sorted(Path(case.model_dir).glob("test_data_set_*")):
        yield tuple(
            [
                read(folder / f"{kind}_{i}.pb", info.type)
                for i, info in enumerate(infos)
                if (folder / f"{kind}_{i}.pb").exists()
            ]
            for kind, infos in (("input", model.graph.input), ("output", model.graph.output))
        )  # type: ignore[misc]


def compare(got: Any, expected: Any, rtol: float, atol: float) -> None:
    if isinstance(expected, list):
        assert isinstance(got, list)
        for item, other in zip(got, expected, strict=True):
            compare(item, other, rtol, atol)
    elif expected is None:
        assert got is None
    else:
        expected = np.asarray(expected)
        if expected.dtype.kind in "OSU":
            np.testing.assert_array_equal(got.astype(str), expected.astype(str))
            return
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        # ONNX computes these in a wider type, then rounds: the last bits of a half float may differ.
        rtol = max(rtol, {"bfloat16": 2e-2, "float16": 4e-3}.get(expected.dtype.name, 0.0))
        if expected.dtype.kind == "V" or expected.dtype.name.startswith(("bfloat", "float8")):
            got, expected = got.astype(np.float32), expected.astype(np.float32)
        np.testing.assert_allclose(got, expected, rtol, atol)


def opset(model: onnx.ModelProto) -> int:
    return max((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), default=1)


@pytest.mark.parametrize("with_passes", [True, False], ids=["passes", "plain"])
@pytest.mark.parametrize("kind", SETS)
def test_onnx_backend(kind: str, with_passes: bool) -> None:
    passed, refused, wrong = 0, [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = load_model_tests(kind=kind)
    for case in cases:
        if case.name.startswith(NOT_REPEATABLE):
            continue
        model = case.model if case.model is not None else onnx.load(Path(case.model_dir) / "model.onnx")
        counted = opset(model) <= 22 and not any(item.domain in ASIDE for item in model.opset_import)
        try:
            plan = tg.build(model, optimise=with_passes)
            for inputs, outputs in data_sets(case, model):
                given = dict(zip((info.name for info in model.graph.input), inputs, strict=False))
                kept = {value.name for value in plan.graph.inputs}
                results = plan.run({name: array for name, array in given.items() if name in kept})
                for info, expected in zip(model.graph.output, outputs, strict=True):
                    compare(results[info.name], expected, case.rtol, case.atol)
            passed += counted
        except (tg.UnsupportedOperatorError, tg.ModelFormatError) as error:
            refused += [case.name] * counted
            if "\n" in error.message:
                wrong.append(f"{case.name}: an error of several lines: {error.message}")
        except AssertionError as error:
            wrong.append(f"{case.name}: {' '.join(str(error).split())[:200]}")
    assert not wrong
    assert passed >= 0.97 * (passed + len(refused)), refused
    assert kind == "node" or not refused


def test_a_third_of_the_operators_on_the_gpus_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here on the CPU: lowered, node by node, by torch. What each operator means is tested above."""
    monkeypatch.setattr(Target, "triton", False)  # Triton's interpreter would take minutes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = [case for case in load_model_tests(kind="node") if not case.name.startswith(NOT_REPEATABLE)]
    passed, wrong = 0, []
    for case in cases[::3]:
        model = case.model if case.model is not None else onnx.load(Path(case.model_dir) / "model.onnx")
        try:
            graph = import_model(model)
            effects = optimise(graph)
        except (tg.UnsupportedOperatorError, tg.ModelFormatError):
            continue
        plan = build(
            graph, effects, "cpu", precision="fp32", tune=False, timing_cache=None, shapes={}, profiles=[],
            calibration=None, budget=None, inductor=False,
        )  # fmt: skip
        kept = {value.name for value in graph.inputs}
        try:
            for inputs, outputs in data_sets(case, model):
                given = dict(zip((info.name for info in model.graph.input), inputs, strict=False))
                results = plan.run({name: array for name, array in given.items() if name in kept})
                for info, expected in zip(model.graph.output, outputs, strict=True):
                    compare(results[info.name], expected, case.rtol, case.atol)
            passed += 1
        except AssertionError as error:
            wrong.append(f"{case.name}: {' '.join(str(error).split())[:200]}")
    assert not wrong
    assert passed > 450
