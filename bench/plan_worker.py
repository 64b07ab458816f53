"""One runtime in a process of its own, for bench/plan.py: it loads a model, then runs it whenever it is told to.

Requests and answers are lines of JSON: {"load": …} first, then {"run": seconds, "least": runs}.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

Run = Callable[[dict[str, Any]], np.ndarray[Any, Any]]


def trine_plan(path: Path, request: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """Build (in this process, so that the plan is loaded in a state that a user's would be in), save, load."""
    import torch

    import trine.graph as tg

    torch.set_num_threads(request["threads"])
    precision = request["precision"]
    data = [dict(np.load(request["inputs"]))] if precision in ("int8", "fp8") else None
    start = time.perf_counter()
    plan = tg.build(path, timing_cache=request["cache"], precision=precision, calibration=data)
    built = time.perf_counter() - start
    target = path.with_suffix(".plan")
    plan.save(target)
    start = time.perf_counter()
    loaded = tg.load_plan(target)
    facts = {"build_s": built, "load_s": time.perf_counter() - start}

    def run(inputs: dict[str, Any]) -> np.ndarray[Any, Any]:
        return next(iter(loaded.run(inputs).values()))

    facts["plan"] = loaded
    return run, facts


def onnxruntime_session(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)[0]


def quantized(path: Path, inputs: str) -> Path:
    """The model as ONNX Runtime's static quantisation leaves it, with a scale for each output channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Once(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [dict(np.load(inputs))]

        def get_next(self) -> dict[str, Any] | None:
            return self.left.pop() if self.left else None

    target = path.with_suffix(".int8.onnx")
    if not target.exists():
        whole = str(path.with_suffix(".whole.onnx"))
        quant_pre_process(str(path), whole, skip_symbolic_shape=True)
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(whole, str(target), Once(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)
    return target


def openvino_request(path: Path, threads: int, hint: str) -> Run:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda inputs: next(iter(request.infer(inputs).values()))


def torch_module(name: str, threads: int) -> Run:
    import torch
    from plan_models import make

    torch.set_num_threads(threads)
    model = make(name)

    def run(inputs: dict[str, Any]) -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            return model(*(torch.from_numpy(array) for array in inputs.values())).numpy()

    return run


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def load(request: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    kind, path, threads = request["load"], Path(request["path"]), request["threads"]
    if kind == "trine":
        return trine_plan(path, request)
    if kind == "torch":
        return torch_module(request["model"], threads), {}
    if request["precision"] == "int8":
        path = quantized(path, request["inputs"])
    if kind == "openvino":
        return openvino_request(path, threads, "bf16" if request["precision"] == "bf16" else "f32"), {}
    return onnxruntime_session(path, threads), {}


def timed(run: Run, inputs: dict[str, Any], seconds: float, least: int) -> list[float]:
    """Milliseconds of each run, after one that does not count."""
    run(inputs)
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < deadline:
        start = time.perf_counter()
        run(inputs)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def main() -> int:
    warnings.simplefilter("ignore")
    request = json.loads(sys.stdin.readline())
    run, facts = load(request)
    inputs = dict(np.load(request["inputs"]))
    before = anonymous_bytes()
    output = run(inputs)
    facts["grown_mb"] = (anonymous_bytes() - before) / 1e6
    plan = facts.pop("plan", None)
    if plan is not None:
        facts["memory"] = plan.inspect()["memory"]
    np.save(request["output"], output)
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(timed(run, inputs, request["run"], request["least"])), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
