"""GPU time of plans beside torch.compile, in one run on one GPU, with every output checked against float32.

    python bench/plan_gpu.py --model resnet50,bert_base --batch 1,32 --dtype fp16 --json OUT.json

Everything is captured as a CUDA graph, replayed back to back, and timed by the device's clock; the runs take turns, and
medians count. torch.compile gets the model in the same type, images with channels innermost, attention as
`scaled_dot_product_attention`. Building is most of the time: each model is built, by us and by the peers, in processes
of its own, which measure candidates one at a time; what they find stays in the caches, from which one process then
takes everything to time it alone.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from plan_models import MODELS, export, make  # noqa: E402

from trine.graph.gpu import GpuRuntime, tuning  # noqa: E402
from trine.graph.gpu.program import Captured  # noqa: E402
from trine.graph.importer import import_model  # noqa: E402
from trine.graph.passes import optimise  # noqa: E402
from trine.graph.tactics import TimingCache  # noqa: E402

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
MODES = {"eager": None, "default": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""Peers. The last has no graphs of its own: everybody's runs are captured here."""
LIMIT = {"fp16": 1e-2, "bf16": 4e-2, "fp8": 8e-2}
"""Largest error of an output, relative to its norm."""
Replay = Callable[[], None]


class Exclusive:
    """Holds the GPU for a measurement, among the processes of this benchmark; may be entered again while held."""

    depth = 0
    file: Any = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        path = os.environ.get("PLAN_GPU_LOCK")
        if path is None or Exclusive.depth:
            yield
            return
        Exclusive.depth += 1
        with open(path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                torch.cuda.synchronize()
                Exclusive.depth -= 1


exclusive = Exclusive()
tuning.exclusive = exclusive


def measure_alone() -> None:
    """Inductor's measurements hold the GPU, too: others' would spoil its choices."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._inductor.select_algorithm import AlgorithmSelectorCache

    for owner, name in ((AlgorithmSelectorCache, "benchmark_choices"), (CachingAutotuner, "benchmark_all_configs")):
        original = owner.__dict__.get(name)
        if original is None:
            continue
        function = original.__func__ if isinstance(original, classmethod | staticmethod) else original

        def held(*args: Any, _function: Any = function, **kwargs: Any) -> Any:
            with exclusive():
                return _function(*args, **kwargs)

        wrapped = type(original)(held) if isinstance(original, classmethod | staticmethod) else held
        setattr(owner, name, wrapped)


def inputs_of(name: str, batch: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return MODELS[name][1](batch)


def placed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """On the GPU; floats in the type, images with channels innermost."""
    x = x.cuda().to(dtype) if x.is_floating_point() else x.cuda()
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def module(name: str, dtype: torch.dtype) -> torch.nn.Module:
    model = make(name).cuda().to(dtype)
    inner = getattr(model, "model", None)
    if hasattr(inner, "set_attn_implementation"):
        inner.set_attn_implementation("sdpa")
    return model.to(memory_format=torch.channels_last)


def peer(name: str, batch: int, dtype: torch.dtype, mode: str) -> tuple[Replay, torch.Tensor]:
    """A replay of the module, compiled in that mode, and its output."""
    torch._dynamo.reset()
    model, given = module(name, dtype), [placed(x, dtype) for x in inputs_of(name, batch)]
    function = model if MODES[mode] is None else torch.compile(model, mode=MODES[mode], dynamic=False, fullgraph=True)

    def call(*inputs: torch.Tensor) -> tuple[torch.Tensor]:
        return (function(*inputs),)

    torch.backends.cudnn.benchmark = True
    with torch.no_grad():
        call(*given)
        captured = Captured(call, given)
    return captured.replay, captured.outputs[0]


def plan(name: str, batch: int, precision: str, args: argparse.Namespace) -> tuple[GpuRuntime, Replay, torch.Tensor]:
    """A replay of our plan, and its output."""
    path = args.folder / f"{name}_{batch}.onnx"
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}")  # other processes look for the model, too
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            export(name, batch, unfinished)
        os.replace(unfinished, path)
    graph = import_model(path)
    optimise(graph)
    runtime = GpuRuntime(graph, "cuda", precision)
    given = inputs_of(name, batch)
    if precision == "fp8":
        runtime.calibrate([given])
    cache = TimingCache(args.folder / f"times_{name}_{batch}_{precision}.json")
    runtime.build({}, cache, True, args.inductor, given)
    cache.save()
    program = runtime.program(list(given))
    if not isinstance(program, Captured):
        raise SystemExit(f"{name}: the plan could not be captured: {program.reason}")
    runtime.run(given)
    return runtime, program.replay, program.outputs[0]


def expected(name: str, batch: int) -> torch.Tensor:
    """The model's output in float32."""
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        result: torch.Tensor = make(name).cuda()(*[x.cuda() for x in inputs_of(name, batch)])
    torch.backends.cudnn.allow_tf32 = True
    return result


def error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((actual.double() - wanted.double()).norm() / wanted.double().norm())


def cosine(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(actual.double().flatten(), wanted.double().flatten(), dim=0))


def replay_us(replay: Replay, seconds: float) -> float:
    """Microseconds a replay, over about so many seconds of them back to back."""
    once = tuning.replay_seconds(replay, 2)
    count = max(3, min(int(seconds / once), 2000))
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3 / count


def compare(name: str, batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Everybody's times of one model and batch, taken in turns."""
    wanted = expected(name, batch)
    replays: dict[str, Replay] = {}
    outputs: dict[str, torch.Tensor] = {}
    runtimes: dict[str, GpuRuntime] = {}
    for dtype in args.dtype:
        if not belongs(name, batch, dtype, args):
            continue
        key = f"trine {dtype}"
        runtimes[key], replays[key], outputs[key] = plan(name, batch, dtype, args)
        for mode in args.peer if dtype == args.dtype[0] and not args.skip_peers else []:
            key = f"{mode} {dtype}"
            if MODES[mode] is not None and not (args.folder / f"cache_{name}_{batch}_{dtype}_{mode}.bin").exists():
                print(f"{name} batch {batch}: {key} is not built: give --prepare more time")
                continue
            try:
                replays[key], outputs[key] = peer(name, batch, DTYPES[dtype], mode)
            except Exception as failure:
                print(f"{name} batch {batch}: {key} failed: {str(failure)[:300]}")
    for replay in replays.values():
        replay()
    torch.cuda.synchronize()
    facts = {key: (error(y, wanted), cosine(y, wanted)) for key, y in outputs.items()}
    times: dict[str, list[float]] = {key: [] for key in replays}
    for _ in range(args.rounds):
        for key, replay in replays.items():
            times[key].append(replay_us(replay, args.seconds))
    rows = []
    for key, values in times.items():
        who, _, dtype = key.rpartition(" ")
        row = {"model": name, "batch": batch, "dtype": dtype, "who": who, "us": statistics.median(values)}
        row |= {"runs": values, "error": facts[key][0], "cosine": facts[key][1]}
        if key in runtimes:
            row["facts"] = runtimes[key].facts()["points"]
            row["profile"] = profile(replays[key]) if args.profile else []
            if not row["error"] <= LIMIT[dtype]:
                print(f"WRONG: {name} batch {batch} {key}: error {row['error']:.2g}")
        rows.append(row)
    return rows


def profile(replay: Replay) -> list[tuple[str, float, int]]:
    """Kernels of a replay, the dearest first: name, microseconds, launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        replay()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda event: -event.device_time_total)
    return [(event.key[:90], event.device_time_total, event.count) for event in events[:14]]


def show(rows: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, float]:
    """The table and the geometric means; ratios above 1 mean that the plan is faster."""
    means: dict[str, list[float]] = {}
    for name, batch, dtype in dict.fromkeys((row["model"], row["batch"], row["dtype"]) for row in rows):
        mine = {r["who"]: r for r in rows if (r["model"], r["batch"], r["dtype"]) == (name, batch, dtype)}
        ours = mine["trine"]["us"]
        line = f"{name:13}{batch:3} {dtype:5} trine {ours:8.1f} µs  err {mine['trine']['error']:.1e}"
        for who, row in mine.items():
            if who != "trine":
                means.setdefault(f"{who} {dtype}", []).append(row["us"] / ours)
                line += f"  {who} {row['us']:8.1f} ({row['us'] / ours:.2f}, err {row['error']:.0e})"
        if dtype == "fp8":
            halves = [
                r["us"]
                for r in rows
                if (r["model"], r["batch"], r["dtype"], r["who"]) == (name, batch, "bf16", "trine")
            ]
            line += f"  of bf16 {halves[0] / ours:.2f}  cosine {mine['trine']['cosine']:.5f}" if halves else ""
        whole = mine["trine"].get("facts", [{}])[-1].get("whole_ms")
        print(line + (f"  {whole}" if whole else ""))
    result = {key: math.exp(sum(map(math.log, values)) / len(values)) for key, values in means.items()}
    for key, value in result.items():
        print(f"geometric mean against {key}: {value:.3f} over {len(means[key])}, least {min(means[key]):.2f}")
    return result


def belongs(name: str, batch: int, dtype: str, args: argparse.Namespace) -> bool:
    """The first type is for all models; others, which are compared with each other, for large products."""
    return dtype == args.dtype[0] or (name in ("bert_base", "vit_b16") and batch > 1)


def prepare(args: argparse.Namespace) -> None:
    """Build every model by everybody, in processes side by side, until `--prepare` seconds are over."""
    environment = {**os.environ, "PLAN_GPU_LOCK": str(args.folder / "lock"), "OMP_NUM_THREADS": "2",
                   "TORCHINDUCTOR_COMPILE_THREADS": "4"}  # fmt: skip
    cases = [(name, batch, dtype) for batch in reversed(args.batch) for name in args.model for dtype in args.dtype]
    cases = [case for case in cases if belongs(*case, args)]
    jobs = [(*case, "trine") for case in cases]
    jobs += [(*case, who) for case in cases for who in args.peer if who != "eager" and case[2] == args.dtype[0]]
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    started = time.monotonic()
    log = open(args.folder / "prepare.log", "ab")  # noqa: SIM115 (the processes write to it until they end)
    while (jobs or running) and time.monotonic() - started < args.prepare:
        while jobs and len(running) < args.processes:
            name, batch, dtype, who = jobs.pop(0)
            command = [sys.executable, __file__, "--model", name, "--batch", str(batch), "--dtype", dtype,
                       "--folder", str(args.folder), "--only", who] + ["--inductor"] * args.inductor  # fmt: skip
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            running.append((f"{name} {batch} {dtype} {who}", process))
        time.sleep(0.2)
        for entry in list(running):
            if entry[1].poll() is not None:
                running.remove(entry)
                failed = f": failed ({entry[1].returncode})" if entry[1].returncode else ""
                print(f"{time.monotonic() - started:6.1f} s  {entry[0]}{failed}")
                sys.stdout.flush()
    for label, process in running:
        print(f"stopped: {label}")
        process.kill()
        process.wait()
    log.close()


def only(args: argparse.Namespace) -> None:
    """One build, for what it leaves in the caches."""
    name, batch, dtype = args.model[0], args.batch[0], args.dtype[0]
    measure_alone()
    if args.only == "trine":
        plan(name, batch, dtype, args)
    else:
        peer(name, batch, DTYPES[dtype], args.only)
        artifacts = torch.compiler.save_cache_artifacts()
        if artifacts is not None:
            (args.folder / f"cache_{name}_{batch}_{dtype}_{args.only}.bin").write_bytes(artifacts[0])


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=names, default=list(MODELS), help=",".join(MODELS))
    parser.add_argument("--batch", type=lambda text: [int(part) for part in names(text)], default=[1, 32])
    parser.add_argument("--dtype", type=names, default=["fp16", "bf16", "fp8"])
    parser.add_argument("--peer", type=names, default=list(MODES), help=",".join(MODES))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/plan_gpu"), help="exported models and caches")
    parser.add_argument("--inductor", action="store_true", help="let plans try TorchInductor over the whole graph")
    parser.add_argument("--skip-peers", action="store_true", help="build them, but time the plans alone")
    parser.add_argument("--prepare", type=float, default=240, help="seconds for builds side by side")
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.02, help="a round")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.only:
        logging.basicConfig()
        logging.getLogger("trine.graph.gpu").setLevel(logging.DEBUG)
        only(args)
        return 0
    if args.prepare:
        prepare(args)
    logging.basicConfig()
    logging.getLogger("trine.graph.gpu").setLevel(logging.DEBUG)
    for file in args.folder.glob("cache_*.bin"):
        torch.compiler.load_cache_artifacts(file.read_bytes())
    rows: list[dict[str, Any]] = []
    for name in args.model:
        for batch in args.batch:
            started = time.monotonic()
            try:
                rows += compare(name, batch, args)
            except Exception as failure:
                print(f"FAILED: {name} batch {batch}: {str(failure)[:500]}")
            print(f"  ({name} {batch}: {time.monotonic() - started:.1f} s)")
            sys.stdout.flush()
            if args.json:
                args.json.write_text(json.dumps(rows))
    means = show(rows, args)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "means": means}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
