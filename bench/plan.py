"""Speed of plans on this machine's CPU, beside other runtimes in the same run, with every output checked.

    python bench/plan.py --peer onnxruntime,openvino,torch --batch 1,8 --threads 2

The runtimes take turns, so that what else the machine does hits all alike; times are medians. A ratio above
1 means that the plan is faster than the fastest peer. `--json FILE` writes what is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from plan_models import MODELS, export, make  # noqa: E402

import trine.graph as tg  # noqa: E402

ROUNDS = 3
Run = Callable[[dict[str, Any]], np.ndarray[Any, Any]]


def trine_plan(path: Path, threads: int, cache: Path) -> tuple[Run, dict[str, Any]]:
    start = time.perf_counter()
    plan = tg.build(path, timing_cache=cache)
    built = time.perf_counter() - start
    target = path.with_suffix(".plan")
    plan.save(target)
    start = time.perf_counter()
    loaded = tg.load_plan(target)
    facts = {"build_s": built, "load_s": time.perf_counter() - start, "memory": loaded.inspect()["memory"]}
    return lambda inputs: next(iter(loaded.run(inputs).values())), facts


def onnxruntime_session(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)[0]


def openvino_request(path: Path, threads: int) -> Run:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda inputs: next(iter(request.infer(inputs).values()))


def torch_module(name: str) -> Run:
    model = make(name)

    def run(inputs: dict[str, Any]) -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            return model(*(torch.from_numpy(array) for array in inputs.values())).numpy()

    return run


def measure(runs: dict[str, Run], inputs: dict[str, Any], seconds: float, least: int) -> dict[str, float]:
    """Median milliseconds of each. They take turns in blocks, with a pause before each and a run that is not counted:
    the threads of some runtimes keep spinning for a while after a run, and would slow the next one down.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            time.sleep(0.1)
            run(inputs)
            deadline = time.perf_counter() + seconds / ROUNDS
            count = 0
            while count < -(-least // ROUNDS) or time.perf_counter() < deadline:
                start = time.perf_counter()
                run(inputs)
                times[name].append((time.perf_counter() - start) * 1e3)
                count += 1
    return {name: statistics.median(values) for name, values in times.items()}


def compare(name: str, batch: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    path = folder / f"{name}_{batch}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = export(name, batch, path)
    plan, facts = trine_plan(path, args.threads, folder / "times.json")
    runs: dict[str, Run] = {"trine": plan}
    for peer in args.peer:
        runs[peer] = (
            torch_module(name)
            if peer == "torch"
            else {"onnxruntime": onnxruntime_session, "openvino": openvino_request}[peer](path, args.threads)
        )
    outputs = {key: run(inputs) for key, run in runs.items()}
    scale = float(np.abs(outputs["trine"]).max())
    for peer in args.peer:
        error = float(np.abs(outputs[peer] - outputs["trine"]).max()) / scale
        if error > 1e-3:
            raise SystemExit(f"{name}: the plan's output differs from {peer}'s by {error:.2g} of its scale")
    times = measure(runs, inputs, args.seconds, args.runs)
    best = min((times[peer] for peer in args.peer), default=math.nan)
    return {"model": name, "batch": batch, "ms": times, "ratio": best / times["trine"], **facts}


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=names, default=["onnxruntime", "openvino"], help="onnxruntime,openvino,torch")
    parser.add_argument("--model", type=names, default=list(MODELS), help=",".join(MODELS))
    parser.add_argument("--batch", type=lambda text: [int(part) for part in names(text)], default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="a runtime and model, at least")
    parser.add_argument("--runs", type=int, default=5, help="of each, at least")
    parser.add_argument("--folder", type=Path, help="keep exported models and the timing cache there")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for name in args.model:
            for batch in args.batch:
                result = compare(name, batch, args, folder)
                results.append(result)
                figures = "  ".join(f"{key} {value:.2f}" for key, value in result["ms"].items())
                print(f"{name:14} batch {batch}  {figures} ms  ratio {result['ratio']:.2f}")
                sys.stdout.flush()
    ratios = [result["ratio"] for result in results]
    if args.peer:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"geometric mean {mean:.2f}, least {min(ratios):.2f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
