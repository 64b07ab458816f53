"""One runtime in a process of its own, for bench/plan.py: it loads a model, then runs it whenever it is told to.

Requests and answers are lines of JSON: {"load": …} first, then {"run": seconds, "least": runs}. With arguments (a
model, threads, a file of inputs) it prints the memory that ONNX Runtime takes for a run instead.
"""

from __future__ import annotations

import ctypes
import json
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

_MMAP_THRESHOLD = -3  # of mallopt

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


def onnxruntime_peak(path: str, threads: int, inputs: dict[str, Any]) -> int:
    """Bytes that a run of ONNX Runtime takes for intermediate values and results, in a process of its own.

    Weights are kept out of its arena, in whose free space activations would not show, and the arena gives its memory
    back after each run: what a run then adds to the process at its peak is what it needs.
    """
    import onnxruntime

    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back to the system at once
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    shrinking = onnxruntime.RunOptions()
    shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    added = []
    for _ in range(4):  # the first runs find out how much there is to allocate
        session.run(None, inputs, shrinking)
        before = memory_line("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
        session.run(None, inputs, shrinking)
        added.append(memory_line("VmHWM") - before)
    return min(added)


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
        logging.getLogger().setLevel(logging.ERROR)  # a warning for every vector that has no channels
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


def memory_line(name: str) -> int:
    """Bytes by a line of /proc/self/status: RssAnon is memory that no file backs, VmHWM the most that VmRSS was."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
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
    command = [sys.executable, __file__, str(path), str(threads), request["inputs"]]
    peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return onnxruntime_session(path, threads), {"peak_mb": peak / 1e6}


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
    if len(sys.argv) > 1:
        path, threads, file = sys.argv[1:]
        print(onnxruntime_peak(path, int(threads), dict(np.load(file))))
        return 0
    request = json.loads(sys.stdin.readline())
    run, facts = load(request)
    inputs = dict(np.load(request["inputs"]))
    before = memory_line("RssAnon")
    output = run(inputs)
    plan = facts.pop("plan", None)
    if plan is not None:  # it keeps the memory of its first run for the next ones
        facts["peak_mb"] = (memory_line("RssAnon") - before) / 1e6
        facts["memory"] = plan.inspect()["memory"]
    np.save(request["output"], output)
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(timed(run, inputs, request["run"], request["least"])), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
