"""GPU time of plans beside torch.compile, in one run on one GPU, with every output checked against float32.

    python bench/plan_gpu.py --model resnet50,bert_base --batch 1,32 --dtype fp16 --json OUT.json

Everything is captured as a CUDA graph, replayed back to back, and timed by the device's clock; the runs take turns, and
medians count. torch.compile gets the model in the same type, images with channels innermost, attention as
`scaled_dot_product_attention`. Building is most of the time: each model is built, by us and by each peer, in a process
of its own, side by side; they measure candidates one at a time, and then wait, with the captured graph, to be asked for
a replay. A model is timed as soon as everybody has it, and all of them again at the end, when nothing is built any
more. What the builds found stays in the folder, where the next call finds it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import math
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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

    def __init__(self) -> None:
        self.depth = 0
        self.mutex = threading.RLock()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        path = os.environ.get("PLAN_GPU_LOCK")
        with self.mutex:
            if path is None or self.depth:
                yield
                return
            self.depth += 1
            with open(path, "w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                try:
                    yield
                finally:
                    if torch.cuda.is_initialized():
                        torch.cuda.synchronize()
                    self.depth -= 1
                    fcntl.flock(file, fcntl.LOCK_UN)


exclusive = Exclusive()
tuning.exclusive = exclusive


def measure_alone() -> None:
    """Inductor's measurements hold the GPU, too: others' would spoil its choices."""
    from torch._inductor.runtime import benchmarking

    for owner in (benchmarking.TritonBenchmarker, benchmarking.InductorBenchmarker):
        original = owner.__dict__.get("benchmark_gpu")
        if original is None:
            continue

        def held(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            with exclusive():
                return _original(*args, **kwargs)

        owner.benchmark_gpu = held  # type: ignore[method-assign]


def compile_candidates_in_threads() -> None:
    """Of this process: what Inductor's compiling processes make of candidates it does not find again (torch 2.11), and
    compiles a second time, one by one, while it measures.
    """
    from torch._inductor import config
    from torch._inductor.select_algorithm import AlgorithmSelectorCache

    original = AlgorithmSelectorCache.make_precompile_fn

    def in_threads(*args: Any, **kwargs: Any) -> Any:
        with config.patch(compile_threads=1):
            return original(*args, **kwargs)

    AlgorithmSelectorCache.make_precompile_fn = in_threads  # type: ignore[method-assign]


def inputs_of(name: str, batch: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return MODELS[name][1](batch)


def placed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """On the GPU; floats in the type, images with channels innermost."""
    x = x.cuda().to(dtype) if x.is_floating_point() else x.cuda()
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def module(name: str, dtype: torch.dtype) -> torch.nn.Module:
    options = {"attention": "sdpa"} if name in ("bert_base", "vit_b16") else {}
    model = make(name, **options).cuda().to(dtype)
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


def profile(replay: Replay) -> list[tuple[str, float, int]]:
    """Kernels of a replay, the dearest first: name, microseconds, launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        replay()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda event: -event.device_time_total)
    return [(event.key[:90], event.device_time_total, event.count) for event in events[:14]]


def show(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The table and the geometric means; ratios above 1 mean that the plan is faster."""
    means: dict[str, list[float]] = {}
    for name, batch, dtype in dict.fromkeys((row["model"], row["batch"], row["dtype"]) for row in rows):
        mine = {r["who"]: r for r in rows if (r["model"], r["batch"], r["dtype"]) == (name, batch, dtype)}
        if "trine" not in mine:
            print(
                f"{name:13}{batch:3} {dtype:5} " + "  ".join(f"{who} {row['us']:.1f} µs" for who, row in mine.items())
            )
            continue
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
        print(line + (f"  {whole}" if whole else ""), flush=True)
    result = {key: math.exp(sum(map(math.log, values)) / len(values)) for key, values in means.items()}
    for key, value in result.items() if len(means) and max(map(len, means.values())) > 1 else ():
        print(f"geometric mean against {key}: {value:.3f} over {len(means[key])}, least {min(means[key]):.2f}")
    return result


def belongs(name: str, batch: int, dtype: str, args: argparse.Namespace) -> bool:
    """The first type is for all models; others, which are compared with each other, for large products."""
    return dtype == args.dtype[0] or (name in ("bert_base", "vit_b16") and batch > 1)


@dataclass
class Build:
    """One model, batch and type by plans or a peer, in a process that builds it and then answers lines."""

    name: str
    batch: int
    dtype: str
    who: str
    process: subprocess.Popen[str] | None = None
    facts: dict[str, Any] | None = None
    """What it says when it is built: errors, seconds, choices."""
    answer: dict[str, Any] | None = None
    runs: list[float] = field(default_factory=list)
    done: bool = False
    """Built, or given up."""

    @property
    def case(self) -> tuple[str, int, str]:
        return self.name, self.batch, self.dtype

    def __str__(self) -> str:
        return f"{self.name} {self.batch} {self.dtype} {self.who}"


class Bench:
    """The processes, and what they have said."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.started = args, time.monotonic()
        self.events: queue.Queue[tuple[Build, dict[str, Any] | None]] = queue.Queue()
        self.log = open(args.folder / "log", "ab")  # noqa: SIM115 (the processes write to it until they end)
        cases = [(name, batch, dtype) for batch in reversed(args.batch) for name in args.model for dtype in args.dtype]
        cases = [case for case in cases if belongs(*case, args)]
        self.builds = [
            Build(*case, who) for case in cases for who in ("trine", *(args.peer if case[2] == args.dtype[0] else ()))
        ]

    def start(self, build: Build) -> None:
        folder = self.args.folder
        caches = folder / "inductor" / f"{build.name}_{build.batch}_{build.dtype}_{build.who}"
        environment = {**os.environ, "PLAN_GPU_LOCK": str(folder / "lock"), "OMP_NUM_THREADS": "2",
                       "TORCHINDUCTOR_COMPILE_THREADS": str(self.args.threads),
                       "TORCHINDUCTOR_CACHE_DIR": str(caches)}  # fmt: skip
        command = [sys.executable, __file__, "--model", build.name, "--batch", str(build.batch), "--dtype", build.dtype,
                   "--folder", str(folder), "--only", build.who] + ["--inductor"] * self.args.inductor  # fmt: skip
        if build.who != "trine":
            environment.pop("TRITON_CACHE_DIR", None)  # Inductor keeps its kernels in its own folder
        build.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._listen, args=(build,), daemon=True).start()

    def _listen(self, build: Build) -> None:
        assert build.process is not None
        assert build.process.stdout is not None
        for line in build.process.stdout:
            self.events.put((build, json.loads(line)))
        self.events.put((build, None))

    def stop(self, build: Build) -> None:
        if build.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(build.process.pid, signal.SIGKILL)  # it, and those that compile for it
            build.process.wait()

    def hear(self, seconds: float) -> None:
        """Take in one event, waiting so long."""
        try:
            build, said = self.events.get(timeout=seconds)
        except queue.Empty:
            return
        if said is None:
            self.stop(build)
            build.process = None
            build.answer = {}
            build.done = True
            print(f"{time.monotonic() - self.started:6.1f} s  {build}: ended", flush=True)
        elif build.facts is None:
            build.facts = said
            build.done = True
            print(f"{time.monotonic() - self.started:6.1f} s  {build}: {described(said)}", flush=True)
        else:
            build.answer = said

    def ask(self, build: Build, what: str) -> dict[str, Any]:
        """The answer to one line; nothing from a process that has ended."""
        if build.process is None or build.process.stdin is None:
            return {}
        build.answer = None
        with contextlib.suppress(BrokenPipeError):
            build.process.stdin.write(what + "\n")
            build.process.stdin.flush()
        while build.answer is None:
            self.hear(1.0)
        return build.answer

    def alike(self, case: tuple[str, int, str]) -> list[Build]:
        return [build for build in self.builds if build.case == case]

    def time(self, case: tuple[str, int, str]) -> None:
        """Time everybody's replays of a case in turns, and print them."""
        ready = [build for build in self.alike(case) if build.facts is not None and build.process is not None]
        for build in ready:
            build.runs = []
        with exclusive():
            for _ in range(self.args.rounds):
                for build in ready:
                    if took := self.ask(build, f"time {self.args.seconds}").get("us"):
                        build.runs.append(took)
        show(self.rows(case))

    def rows(self, case: tuple[str, int, str] | None = None) -> list[dict[str, Any]]:
        return [
            {"model": build.name, "batch": build.batch, "dtype": build.dtype, "who": build.who, **(build.facts or {}),
             "us": statistics.median(build.runs), "runs": build.runs}
            for build in self.builds if build.runs and case in (None, build.case)
        ]  # fmt: skip

    def run(self) -> list[dict[str, Any]]:
        waiting, timed = list(self.builds), set[tuple[str, int, str]]()
        cases = {build.case for build in self.builds}
        while time.monotonic() - self.started < self.args.prepare:
            busy = [build for build in self.builds if build.process is not None and build.facts is None]
            if not waiting and not busy:
                break
            while waiting and len(busy) < self.args.processes:
                busy.append(waiting.pop(0))
                self.start(busy[-1])
            self.hear(0.5)
            for case in cases - timed:
                if all(build.done for build in self.alike(case)):
                    timed.add(case)
                    self.time(case)
                    self.write()
        for build in self.builds:
            if build.process is not None and build.facts is None:
                print(f"stopped: {build}", flush=True)
                self.stop(build)
                build.process = None
        print("all once more, alone:")
        for case in dict.fromkeys(build.case for build in self.builds):
            self.time(case)
            self.write()
        for build in self.builds if self.args.profile else []:
            if build.facts is not None:
                build.facts |= self.ask(build, "profile")
                self.write()
        return self.rows()

    def write(self) -> None:
        if self.args.json:
            self.args.json.write_text(json.dumps(self.rows()))


def described(facts: dict[str, Any]) -> str:
    """What a process says of its build, in a line."""
    wrong = "" if facts["right"] else "WRONG: "
    return f"{wrong}built in {facts['seconds']:.1f} s, error {facts['error']:.1e}{facts.get('note', '')}"


def only(args: argparse.Namespace) -> None:
    """One build: says on standard output when it is done, and answers lines of standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is for the log
    started = time.monotonic()
    name, batch, dtype = args.model[0], args.batch[0], args.dtype[0]
    measure_alone()
    facts: dict[str, Any] = {}
    if args.only == "trine":
        runtime, replay, output = plan(name, batch, dtype, args)
        facts["facts"] = runtime.facts()["points"]
    else:
        replay, output = peer_from_cache(name, batch, dtype, args, facts)
    replay()
    torch.cuda.synchronize()
    wanted = expected(name, batch)
    facts |= {"error": error(output, wanted), "cosine": cosine(output, wanted), "seconds": time.monotonic() - started}
    facts["right"] = facts["error"] <= LIMIT[dtype]
    del wanted
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        what, *rest = line.split()
        answer = {"us": replay_us(replay, float(rest[0]))} if what == "time" else {"profile": profile(replay)}
        print(json.dumps(answer), file=answers, flush=True)


def peer_from_cache(
    name: str, batch: int, dtype: str, args: argparse.Namespace, facts: dict[str, Any]
) -> tuple[Replay, torch.Tensor]:
    """The peer's build, from what an earlier call found, and kept for the next."""
    if MODES[args.only] is None:
        return peer(name, batch, DTYPES[dtype], args.only)
    from torch._dynamo.utils import counters
    from torch._inductor.async_compile import AsyncCompile

    path = args.folder / f"cache_{name}_{batch}_{dtype}_{args.only}.bin"
    if path.exists():
        torch.compiler.load_cache_artifacts(path.read_bytes())
    else:
        AsyncCompile.wait_pool_ready()  # for all kernels but candidates
        compile_candidates_in_threads()
    result = peer(name, batch, DTYPES[dtype], args.only)
    hits, misses = (counters["inductor"][f"fxgraph_cache_{kind}"] for kind in ("hit", "miss"))
    facts["note"] = f", graphs from the cache {hits}, new {misses}"
    artifacts = None if path.exists() and not misses else torch.compiler.save_cache_artifacts()
    if artifacts is not None:
        path.write_bytes(artifacts[0])
    return result


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
    parser.add_argument("--prepare", type=float, default=240, help="seconds for builds side by side")
    parser.add_argument("--processes", type=int, default=16, help="builds at once")
    parser.add_argument("--threads", type=int, default=8, help="of Inductor's compiler in each")
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
    bench = Bench(args)
    os.environ["PLAN_GPU_LOCK"] = str(args.folder / "lock")
    try:
        rows = bench.run()
    finally:
        for build in bench.builds:
            bench.stop(build)
    means = show(rows)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "means": means}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
