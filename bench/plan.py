"""Speed of plans on this machine's CPU, beside other runtimes in the same run, with every output checked.

    python bench/plan.py --peer onnxruntime,openvino,torch --batch 1,8 --threads 2

Each runtime has a process of its own. They take turns, so that what else the machine does hits all alike, and no
threads of one still look for work while another runs; times are medians. A ratio above 1 means that the plan is faster
than the fastest peer. `--json FILE` writes what is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from plan_models import MODELS, export  # noqa: E402

ROUNDS = 4
TOLERANCES = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.5}
"""Of the largest number: lower precisions round in places of their own, and peers' sums may saturate on AVX2."""


class Worker:
    """A runtime in another process (bench/plan_worker.py)."""

    def __init__(self, kind: str, request: dict[str, Any]) -> None:
        self.kind = kind
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "plan_worker.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.facts: dict[str, Any] = self._ask({**request, "load": kind})

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.kind} ended with status {self.process.wait()}")
        return json.loads(line)

    def run(self, seconds: float, least: int) -> list[float]:
        """Milliseconds of runs."""
        times: list[float] = self._ask({"run": seconds, "least": least})
        return times

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(workers: list[Worker], seconds: float, least: int) -> dict[str, float]:
    """Median milliseconds of each; they take turns in blocks, the order turned round each time."""
    times: dict[str, list[float]] = {worker.kind: [] for worker in workers}
    for turn in range(ROUNDS):
        for worker in workers if turn % 2 == 0 else workers[::-1]:
            time.sleep(0.05)
            times[worker.kind] += worker.run(seconds / ROUNDS, -(-least // ROUNDS))
    return {name: statistics.median(values) for name, values in times.items()}


def compare(name: str, batch: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    path = folder / f"{name}_{batch}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = export(name, batch, path)
    np.savez(folder / "inputs.npz", **inputs)
    request = {"path": str(path), "model": name, "threads": args.threads, "inputs": str(folder / "inputs.npz")}
    request["precision"] = args.precision
    workers: list[Worker] = []
    outputs: dict[str, Any] = {}
    try:
        for kind in ("trine", *args.peer):
            output = folder / f"{kind}.npy"
            workers.append(Worker(kind, {**request, "output": str(output), "cache": str(folder / "times.json")}))
            outputs[kind] = np.load(output)
        scale = float(np.abs(outputs["trine"]).max())
        for peer in args.peer:
            error = float(np.abs(outputs[peer] - outputs["trine"]).max()) / scale
            if error > TOLERANCES[args.precision]:
                raise SystemExit(f"{name}: the plan's output differs from {peer}'s by {error:.2g} of its scale")
        times = measure(workers, args.seconds, args.runs)
    finally:
        for worker in workers:
            worker.close()
    best = min((times[peer] for peer in args.peer), default=math.nan)
    facts = workers[0].facts
    peaks = {worker.kind: worker.facts["peak_mb"] for worker in workers if "peak_mb" in worker.facts}
    return {"model": name, "batch": batch, "ms": times, "ratio": best / times["trine"], **facts, "peak_mb": peaks}


def line(result: dict[str, Any]) -> str:
    figures = "  ".join(f"{key} {value:.2f}" for key, value in result["ms"].items())
    peaks = ", ".join(f"{key} {value:.1f}" for key, value in result["peak_mb"].items())
    text = f"{result['model']:14} batch {result['batch']}  {figures} ms  ratio {result['ratio']:.2f}"
    text += f"  build {result['build_s']:.1f} load {result['load_s']:.2f} s  peak {peaks} MB"
    if result["memory"] is not None:
        share = result["memory"]["peak"] / result["memory"]["total"]
        text += f" ({share:.2f} of the sum of {result['memory']['total'] / 1e6:.1f})"
    return text


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=names, default=["onnxruntime", "openvino"], help="onnxruntime,openvino,torch")
    parser.add_argument("--model", type=names, default=list(MODELS), help=",".join(MODELS))
    parser.add_argument("--batch", type=lambda text: [int(part) for part in names(text)], default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--precision",
        choices=list(TOLERANCES),
        default="fp32",
        help="bf16: OpenVINO's own, beside ONNX Runtime's fp32; int8: both run ONNX Runtime's quantised model",
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="a runtime and model, at least")
    parser.add_argument("--runs", type=int, default=5, help="of each, at least")
    parser.add_argument("--folder", type=Path, help="keep exported models and the timing cache there")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in args.model:
            for batch in args.batch:
                result = compare(name, batch, args, folder)
                results.append(result)
                print(line(result), flush=True)
    ratios = [result["ratio"] for result in results]
    if args.peer:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"geometric mean {mean:.2f}, least {min(ratios):.2f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
