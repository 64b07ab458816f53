"""ONNX's own tests of operators on the GPU side's runtime, here on the CPU: lowered, node by node, by torch."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import pytest
from onnx.backend.test.loader import load_model_tests

import trine.graph as tg
from tests.graph.test_onnx_backend import NOT_REPEATABLE, compare, data_sets
from trine.graph.gpu.api import build
from trine.graph.gpu.registry import Target
from trine.graph.importer import import_model
from trine.graph.passes import optimise

EVERY = 3
"""A third of the models is enough here: what each operator means is tested elsewhere."""


def test_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "triton", False)  # Triton's interpreter would take minutes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = [case for case in load_model_tests(kind="node") if not case.name.startswith(NOT_REPEATABLE)]
    passed, wrong = 0, []
    for case in cases[::EVERY]:
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
