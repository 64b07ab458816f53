"""Where the time of a decode step goes: the GPU's kernels and gaps, the host's functions.

    python bench/profile_step.py --shape Llama-3.1-8B --rows 1 --rows 16 --rows 256 --context 256

Weights are random; speed depends on shapes only. Each number of rows is run twice. Without a profiler: milliseconds a
step, and the host's share of them by function; what it spends waiting for the GPU is its slack. Under torch.profiler:
each kernel's time a step, and the share of the time in which none runs. Kernels launched early overlap the ones before
them, so a kernel counts from the end of those before it.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gpu_engine
import torch
from gpu_report import Report
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record

from trine import LLM, SamplingParams
from trine.llm.processor import Processor
from trine.llm.scheduler import Scheduler
from trine.llm.worker import Worker

WARM_UP = 8
"""Steps after the prompts that are left out: graphs are captured in them."""

HOST = {
    "schedule": (Scheduler, "schedule"),
    "forward": (Worker, "forward"),
    "sample": (Worker, "sample"),
    "update": (Scheduler, "update"),
    "process": (Processor, "process"),
    "wait": (torch.cuda.Event, "synchronize"),
}


@contextmanager
def timed(spent: dict[str, float]) -> Iterator[None]:
    """Add up the seconds that the functions of HOST take."""
    kept: list[tuple[Any, str, Callable[..., Any]]] = []

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timing(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        return timing

    for name, (owner, attribute) in HOST.items():
        function = getattr(owner, attribute)
        kept.append((owner, attribute, function))
        setattr(owner, attribute, wrap(name, function))
    try:
        yield
    finally:
        for owner, attribute, function in kept:
            setattr(owner, attribute, function)


def run(llm: LLM, rows: int, context: int, steps: int, **sampling: Any) -> list[float]:
    """The clock after each engine step while `rows` sequences decode, prompts and the warm-up left out."""
    params = SamplingParams(**{"temperature": 0, "ignore_eos": True, "detokenize": False} | sampling,
                            max_tokens=WARM_UP + steps)  # fmt: skip
    prompts = [{"prompt_token_ids": [7 + row] * context} for row in range(rows)]
    clock: list[float] = []
    core = llm._core
    kept = core.step

    def step() -> Any:
        output = kept()
        if len(output.outputs) == rows:
            clock.append(time.perf_counter())
        return output

    core.step = step  # type: ignore[method-assign]
    try:
        llm.generate(prompts, params)
    finally:
        core.step = kept  # type: ignore[method-assign]
    return clock[WARM_UP:]


def profile_host(report: Report, llm: LLM, name: str, rows: int, context: int, steps: int, **sampling: Any) -> None:
    clock = run(llm, rows, context, steps, **sampling)
    step = (clock[-1] - clock[0]) / (len(clock) - 1)
    spent: dict[str, float] = defaultdict(float)
    with timed(spent):
        run(llm, rows, context, steps, **sampling)
    total = WARM_UP + steps
    shares = {f"{part}_us": round(1e6 * seconds / total, 1) for part, seconds in spent.items()}
    report.show("host", name, step_ms=step * 1e3, **shares)


def profile_gpu(report: Report, llm: LLM, name: str, rows: int, context: int, steps: int, **sampling: Any) -> None:
    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        run(llm, rows, context, steps, **sampling)
    cuda = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
    events = sorted((e.time_range.start, e.time_range.end, e.name) for e in recorded.events() if e.device_type == cuda)
    last_prefill = max((i for i, event in enumerate(events) if "prefill" in event[2]), default=0)
    events = events[last_prefill + 1 :]
    events = events[len(events) * WARM_UP // (WARM_UP + steps) :]
    alone: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    busy, until = 0.0, events[0][0]
    for start, end, kernel in events:
        own = max(0.0, end - max(start, until))
        alone[kernel] += own
        counts[kernel] += 1
        busy += own
        until = max(until, end)
    span = until - events[0][0]
    done = max(1, round(steps * (len(events) - 1) / len(events)))
    report.show("gpu", name, step_ms=span / done / 1e3, idle=1 - busy / span, kernels=len(events) / done)
    for kernel, took in sorted(alone.items(), key=lambda item: -item[1])[:16]:
        count = counts[kernel]
        print(f"  {took / done:9.1f} us {count / done:7.1f} x {took / count:8.2f} us  {kernel[:100]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="Llama-3.1-8B", choices=tuple(gpu_engine.SHAPES))
    parser.add_argument("--rows", type=int, action="append", help="may be repeated (default: 1, 16, 256)")
    parser.add_argument("--context", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--quantization", choices=("fp8",))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = Report({"profile"}, options.json)
    with gpu_engine.loaded(report, options.shape, quantization=options.quantization) as llm:
        for rows in options.rows or [1, 16, 256]:
            name = f"{options.shape} {rows} rows"
            shape = (rows, options.context, options.steps)
            run(llm, *shape)  # compiles, captures
            report.part("profile", functools.partial(profile_host, report, llm, name, *shape))
            report.part("profile", functools.partial(profile_gpu, report, llm, name, *shape))


if __name__ == "__main__":
    main()
