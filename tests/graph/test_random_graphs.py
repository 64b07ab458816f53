"""Random graphs give what ONNX Runtime gives, with every pass on."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

import trine.graph as tg
from tests.graph.random_graphs import random_model

onnxruntime.set_default_logger_severity(4)


def differs(seed: int) -> str | None:
    """What is wrong with the plan of the random model `seed`; None if nothing is."""
    model, inputs = random_model(seed)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = model.SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    expected = dict(zip(names, session.run(names, inputs), strict=True))
    results = tg.build(data, tune=seed % 10 == 0).run(inputs)
    for name in names:
        got, wanted = results[name], expected[name]
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            return f"{name}: {got.dtype}{got.shape}, not {wanted.dtype}{wanted.shape}"
        scale = max(float(np.nanmax(np.abs(wanted), initial=0)), 1.0)
        if not np.allclose(got, wanted, rtol=1e-3, atol=1e-4 * scale, equal_nan=True):
            return f"{name}: off by {np.nanmax(np.abs(got - wanted))} of {scale}"
    return None


@pytest.mark.parametrize("block", [pytest.param(i, marks=pytest.mark.slow if i else ()) for i in range(10)])
def test_random_graphs_equal_onnxruntime(block: int) -> None:
    wrong = {seed: reason for seed in range(block * 200, (block + 1) * 200) if (reason := differs(seed))}
    assert not wrong
