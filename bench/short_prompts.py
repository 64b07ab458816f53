"""Short prompts on a GPU: steps that hold them as CUDA graphs beside single launches, in turns in one process.

    python bench/short_prompts.py [SHAPE] [--quantization fp8] [--cache-dtype fp8] [--layers N] [--rate R] [--seconds S]

check   steps of all sizes, computed twice from the same state: hidden states of the graph beside single launches'
first   seconds from a request to its first token, on an idle engine
load    requests of 128 tokens in, 64 out at random moments: between tokens, to the first one, tokens a second

Weights are random: times depend on shapes only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from gpu_engine import SHAPES

from trine import LLM, SamplingParams
from trine.llm.graphs import Size, StepGraphs
from trine.llm.request import SequenceRequest
from trine.llm.scheduler import Step
from trine.llm.worker import Worker

LENGTHS = (32, 64, 128, 256, 512, 1000, 2000)
TOLERANCE = 0.2
"""Of ‖graph − launched‖ / ‖launched‖ of a row. With padding products take other tiles: float8 rounds by a sixteenth,
and another expert is chosen where two tie. What reads a wrong token or block is off by about 1."""


class Engine:
    """The engine's core, and requests of random tokens for it."""

    def __init__(self, llm: LLM) -> None:
        self.core = llm._core
        self._ids = itertools.count(1_000_000)
        self._draw = random.Random(0)

    def prompt(self, length: int) -> list[int]:
        return [self._draw.randrange(1000, 100_000) for _ in range(length)]

    def request(self, prompt: list[int], count: int, logprobs: int | None = None) -> SequenceRequest:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=logprobs)
        return SequenceRequest(next(self._ids), prompt, params, 0, count)

    def drain(self) -> None:
        while self.core.has_work:
            self.core.step()


@contextmanager
def prompts_launched() -> Iterator[None]:
    """Graphs for steps of decodes only."""
    kept = StepGraphs.size

    def size(self: StepGraphs, num_decodes: int, num_prompts: int, num_tokens: int, settled: bool) -> Size | None:
        return kept(self, num_decodes, num_prompts, num_tokens, settled) if settled and not num_prompts else None

    StepGraphs.size = size  # type: ignore[method-assign]
    try:
        yield
    finally:
        StepGraphs.size = kept  # type: ignore[method-assign]


@contextmanager
def compared(errors: dict[Size, float]) -> Iterator[None]:
    """Every step that a graph runs is launched again; notes each size's largest error of a row."""
    forward, size = Worker.forward, StepGraphs.size
    chosen: list[Size | None] = []

    def noted(self: StepGraphs, *args: Any, **options: Any) -> Size | None:
        chosen.append(size(self, *args, **options))
        return chosen[-1]

    @torch.inference_mode()
    def twice(self: Worker, step: Step) -> None:
        chosen.clear()
        forward(self, step)
        own, hidden = chosen[-1] if chosen else None, self._hidden
        if own is None or hidden is None:
            return
        token_ids, batch = self._gather(step)
        expected = self.model(token_ids, batch).float()
        if len(expected) > len(hidden):
            expected = expected[torch.from_numpy(self._ends).to(expected.device).long()]
        error = ((hidden.float() - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
        errors[own] = max(errors.get(own, 0.0), error) if error == error else float("inf")

    Worker.forward, StepGraphs.size = twice, noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Worker.forward, StepGraphs.size = forward, size  # type: ignore[method-assign]


def check(engine: Engine) -> bool:
    """Prompts alone, several, beside decodes, of whole blocks that another brings in the same step."""
    errors: dict[Size, float] = {}
    draw = random.Random(1)
    shared = engine.prompt(640)
    with compared(errors):
        for length in (1, 5, 17, 31, 33, 64, 100, 129, 190, 300, 512, 513, 900, 1300, 2000):
            engine.core.add(engine.request(engine.prompt(length), 6, logprobs=0))
            engine.drain()
        for turn in range(150):
            engine.core.add(engine.request(engine.prompt(draw.choice((1, 3, 20, 40, 90, 200))), turn + 1, logprobs=0))
            for _ in range(turn % 3):
                engine.core.add(engine.request(shared[: draw.choice((65, 129, 300, 640))], 9, logprobs=0))
            engine.core.step()
        engine.drain()
    for size in sorted(errors):
        print(f"check {size.decodes:4} decodes of {size.tokens or size.decodes:4} tokens: error {errors[size]:.4f}")
    return max(errors.values()) <= TOLERANCE


def time_first(engine: Engine) -> None:
    for length in LENGTHS:
        medians = []
        for how in (prompts_launched, nullcontext) * 2:
            times = []
            with how():
                for _ in range(8):
                    engine.core.add(engine.request(engine.prompt(length), 1))
                    start = time.perf_counter()
                    engine.drain()
                    times.append(1e3 * (time.perf_counter() - start))
            medians.append(f"{statistics.median(times[2:]):.2f}")
        launched, graph = medians[::2], medians[1::2]
        print(f"first {length:5} tokens: launched {', '.join(launched)} ms; graph {', '.join(graph)} ms", flush=True)


def serve(engine: Engine, rate: float, seconds: float) -> str:
    """Poisson arrivals; what a stream's reader sees."""
    draw = random.Random(1)
    moments: list[float] = []
    while (at := (moments[-1] if moments else 0.0) + draw.expovariate(rate)) < seconds:
        moments.append(at)
    waiting = [(at, engine.request(engine.prompt(128), 64)) for at in reversed(moments)]
    due, last = {request.id: at for at, request in waiting}, {}
    first, between = [], []
    start = time.perf_counter()
    while waiting or engine.core.has_work:
        while waiting and waiting[-1][0] <= time.perf_counter() - start:
            engine.core.add(waiting.pop()[1])
        if not engine.core.has_work:
            time.sleep(1e-4)
            continue
        outputs = engine.core.step().outputs
        now = time.perf_counter() - start
        for output in outputs:
            (between if output.id in last else first).append(1e3 * (now - last.get(output.id, due[output.id])))
            last[output.id] = now
    middle, late = (sorted(between)[int(share * len(between))] for share in (0.5, 0.99))
    own_middle, own_late = (sorted(first)[int(share * len(first))] for share in (0.5, 0.99))
    return (
        f"{64 * len(moments) / now:6.0f} tokens/s; between tokens median {middle:.2f}, 99 % {late:.2f} ms; "
        f"first median {own_middle:.1f}, 99 % {own_late:.1f} ms"
    )


def free_bytes() -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", default="Llama-3.1-8B", choices=SHAPES)
    parser.add_argument("--quantization", choices=("fp8",))
    parser.add_argument("--cache-dtype", default="auto", choices=("auto", "fp8"))
    parser.add_argument("--layers", type=int, metavar="N", help="of the model, which the check needs few of")
    parser.add_argument("--only", default="check,first,load")
    parser.add_argument("--rate", type=float, default=40.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()
    config = SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})
    parts, right = args.only.split(","), True
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        options = {"quantization": args.quantization, "cache_dtype": args.cache_dtype, "max_model_len": 8192}
        with LLM(folder, load_format="dummy", cache_bytes=16 << 30, **options) as llm:
            engine = Engine(llm)
            free = free_bytes()
            if "check" in parts:
                right = check(engine)
            if "first" in parts:
                time_first(engine)
            if "load" in parts:
                serve(engine, args.rate, 1.5)  # captures
                for how in (prompts_launched, nullcontext) * 2:
                    with how():
                        line = serve(engine, args.rate, args.seconds)
                    print(f"load, {'launched' if how is prompts_launched else 'graphs'}: {line}", flush=True)
            print(f"graphs and what else stayed: {(free - free_bytes()) >> 20} MiB")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
