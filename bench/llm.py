"""Speed of the language-model engine beside its peers and the machine's limits, all measured in one run.

    python bench/llm.py --model Qwen2.5-0.5B --workload cpu-1 --workload cpu-8 --peer transformers --peer llama_cpp
    python bench/llm.py --model Llama-3.1-8B --workload single --workload batch16 --peer vllm --json result.jsonl
    python bench/llm.py --model ./checkpoint --quantization int8 --workload cpu-1 --peer openvino

--model is a directory or a named shape (bench/shapes; "tiny" is the embedded model). A shape has random weights: speed
does not depend on their values. Each engine runs in a process of its own, with an interpreter of its own: the first of
--python NAME=PATH, the variable TRINE_PEER_NAME_PYTHON, the environment PEERS_DIR/v-NAME, and this one. The engines
take turns (A B A B …) with the same prompts, new ones each time; figures are medians. Answers are checked: their
length, finite log-probabilities, the same tokens for the same prompts, and Transformers' tokens where that is a peer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import checkpoints  # noqa: E402
import roofline  # noqa: E402
from peers.engine_process import EngineProcess, EngineUnavailableError, interpreter  # noqa: E402

WORKLOADS = {
    "cpu-1": (1, 128, 64),
    "cpu-8": (8, 128, 64),
    "cpu-32": (32, 128, 64),
    "single": (1, 128, 256),
    "batch16": (16, 128, 256),
    "decode": (256, 128, 512),
    "mixed": (512, 1024, 256),
    "prefill": (64, 4096, 1),
}
"""Requests, tokens a prompt, tokens an answer."""

LOAD = (64, 384, 12, 8192, 0.4)
"""Decoding streams, tokens of each, prompts that arrive meanwhile, their tokens, seconds between them."""

PEERS = ("transformers", "llama_cpp", "openvino", "vllm")
LONG = 5.0
"""Seconds of a run from which on it is not repeated for the check."""
PAUSE = 0.3
"""Seconds between two engines' turns: waiting OpenMP threads spin for a fifth of a second."""


@dataclass
class Runs:
    """One engine's times on one workload: `first` to one token an answer, `whole` to all of them, in seconds."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: list[list[list[int]]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def figures(self, shape: tuple[int, int, int]) -> dict[str, float]:
        """Tokens a second of all requests together, from the medians."""
        requests, prompt_len, output_len = shape
        whole = statistics.median(self.whole)
        figures = {
            "output_tok_s": requests * output_len / whole,
            "total_tok_s": requests * (prompt_len + output_len) / whole,
        }
        if self.first or output_len == 1:
            first = statistics.median(self.first or self.whole)
            figures["prefill_tok_s"] = requests * prompt_len / first
            if output_len > 1:
                # On a noisy machine the whole can come out quicker than its part; such a rate means nothing.
                figures["decode_tok_s"] = requests * (output_len - 1) / max(whole - first, 1e-9)
        return figures


def main() -> int:
    args = parse_arguments()
    needs_files = bool({"transformers", "llama_cpp", "openvino"} & set(args.peer))
    model = checkpoints.find(args.model, args.peers_dir, write_weights=needs_files)
    limits = roofline.measure_limits(args.threads)
    print(f"# limits measured here: {roofline.describe(limits)}", flush=True)
    names = ("trine", *args.peer)
    infos: dict[str, dict[str, Any]] = {}
    runs: dict[str, dict[str, Runs]] = {name: {} for name in args.workload}
    right = True
    for group in [(name,) for name in names] if args.apart else [names]:
        engines = dict(start_engines(args, model, group))
        infos |= {name: engine.info for name, engine in engines.items()}
        try:
            for workload in args.workload:
                runs[workload] |= measure(workload, args, model, engines)
                if group[-1] == names[-1]:
                    rows = report(workload, args, model, limits, infos, runs[workload])
                    right = right and not any(row["faults"] for row in rows)
                    keep(args.json, rows)
            if args.load:
                keep(args.json, run_load(args, model, engines))
        finally:
            for engine in engines.values():
                engine.close()
    return 0 if right else 1


def keep(file: str | None, rows: list[dict[str, Any]]) -> None:
    """Append rows to the JSON lines as soon as they are known: the next workload may be stopped half-way."""
    if file:
        with open(file, "a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR|SHAPE", help=f"shapes: {', '.join(checkpoints.SHAPES)}")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--quantization", choices=("int8", "fp8"), help="of the weights; llama.cpp's int8 is Q8_0")
    parser.add_argument(
        "--workload", action="append", choices=tuple(WORKLOADS), help="may be repeated (default: cpu-1)"
    )
    parser.add_argument("--whole", action="store_true", help="don't time runs to the first token")
    parser.add_argument("--apart", action="store_true", help="one engine after the other, where memory is short")
    parser.add_argument("--load", action="store_true", help="latency of decoding streams while long prompts arrive too")
    parser.add_argument("--peer", action="append", default=[], choices=PEERS, help="may be repeated")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="a peer's interpreter")
    parser.add_argument(
        "--peers-dir",
        type=Path,
        default=checkpoints.default_directory(),
        metavar="DIR",
        help="environments v-NAME and converted checkpoints (default: the variable PEERS_DIR, or .peers)",
    )
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="turns of each engine (default: 3)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of each engine (default: all)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--json", metavar="FILE", help="append a JSON line for each engine and workload")
    args = parser.parse_args()
    args.workload = args.workload or ["cpu-1"]
    if args.threads is None:
        from trine.llm.options import available_cpus

        args.threads = available_cpus()
    return args


def start_engines(
    args: argparse.Namespace, model: checkpoints.Model, names: tuple[str, ...]
) -> Iterator[tuple[str, EngineProcess]]:
    """Trine, which must start, and the peers that do; why another did not is printed."""
    shapes = [WORKLOADS[name] for name in args.workload]
    if args.load:
        shapes += [(LOAD[0], 128, LOAD[1]), (1, LOAD[3], 1)]
    given = dict(pair.split("=", 1) for pair in args.python)
    for name in names:
        settings: dict[str, Any] = {
            "dtype": args.dtype,
            "quantization": args.quantization,
            "device": args.device,
            "threads": args.threads,
            "vocab_size": model.config["vocab_size"],
            "max_len": max(prompt + output for _, prompt, output in shapes) + 16,
            "max_requests": max(requests for requests, _, _ in shapes),
            # Half of a GPU each, where two engines share it.
            "memory_share": 0.9 / (2 if {"trine", "vllm"} <= set(names) else 1),
        }
        try:
            settings |= checkpoints.files_for(name, model, args.quantization, args.peers_dir)
            engine = EngineProcess(name, interpreter(name, given, args.peers_dir), settings)
        except EngineUnavailableError as error:
            print(f"# {name} does not run: {error}", flush=True)
            if name == "trine":
                raise SystemExit(1) from error
            continue
        print(
            f"# {name} {engine.info['version']} on {engine.info['device']}: ready in {engine.info['ready_s']:.1f} s",
            flush=True,
        )
        yield name, engine


def make_prompts(model: checkpoints.Model, shape: tuple[int, int, int], seed: int) -> list[list[int]]:
    requests, prompt_len, _ = shape
    draw = random.Random(seed)
    vocab_size = model.config["vocab_size"]
    return [
        [draw.randrange(vocab_size // 100, vocab_size - vocab_size // 100) for _ in range(prompt_len)]
        for _ in range(requests)
    ]


def measure(
    name: str, args: argparse.Namespace, model: checkpoints.Model, engines: dict[str, EngineProcess]
) -> dict[str, Runs]:
    """Warm each engine up, take turns, check Trine's answers."""
    shape = WORKLOADS[name]
    output_len = shape[2]
    runs = {engine: Runs() for engine in engines}
    for engine in engines.values():
        warm_up = [prompt[:17] for prompt in make_prompts(model, shape, seed=-1)]
        for _ in range(2):
            engine.generate(warm_up, min(16, output_len))
    for turn in range(args.repeat):
        for key, engine in engines.items():
            time.sleep(PAUSE)
            if output_len > 1 and not args.whole:
                seconds, _ = engine.generate(make_prompts(model, shape, seed=2 * turn), 1)
                runs[key].first.append(seconds)
            seconds, tokens = engine.generate(make_prompts(model, shape, seed=2 * turn + 1), output_len)
            runs[key].whole.append(seconds)
            runs[key].tokens.append(tokens)
    if "trine" in engines:
        runs["trine"].faults = check_answers(engines, runs, model, shape)
    return runs


def report(
    name: str,
    args: argparse.Namespace,
    model: checkpoints.Model,
    limits: roofline.Limits,
    infos: dict[str, dict[str, Any]],
    runs: dict[str, Runs],
) -> list[dict[str, Any]]:
    """Print a workload's figures; a JSON-able row for each engine."""
    shape = WORKLOADS[name]
    faults = runs["trine"].faults
    bound = roofline.bound(model.config, limits, shape, args.dtype, args.quantization)
    rows = []
    trine = runs["trine"].figures(shape)
    for key, own in runs.items():
        figures = own.figures(shape)
        rows.append(
            {
                "model": args.model,
                "dtype": args.dtype,
                "quantization": args.quantization,
                "workload": name,
                "engine": key,
                "version": infos[key]["version"],
                "ready_s": infos[key]["ready_s"],
                **{metric: round(value, 2) for metric, value in figures.items()},
                "limit_share": {
                    metric: round(figures[metric] / most, 3) for metric, most in bound.items() if metric in figures
                },
                "trine_ratio": {metric: round(trine[metric] / value, 3) for metric, value in figures.items()},
                "first_s": [round(seconds, 4) for seconds in own.first],
                "whole_s": [round(seconds, 4) for seconds in own.whole],
                "limits": limits.as_dict(),
                "faults": faults if key == "trine" else [],
            }
        )
    print_rows(name, shape, rows, faults)
    return rows


def run_load(
    args: argparse.Namespace, model: checkpoints.Model, engines: dict[str, EngineProcess]
) -> list[dict[str, Any]]:
    """Streams that decode while long prompts keep arriving: milliseconds between a stream's tokens, and throughput."""
    streams, stream_new, prompts, prompt_len, interval = LOAD
    print(
        f"\nload: {streams} streams of {stream_new} tokens, every {interval} s one of {prompts} prompts of {prompt_len}"
    )
    rows = []
    for name, engine in engines.items():
        texts = make_prompts(model, (streams, 128, 1), seed=7), make_prompts(model, (prompts, prompt_len, 1), seed=8)
        requests = [{"at": 0.0, "prompt": prompt, "new": stream_new} for prompt in texts[0]]
        requests += [{"at": 1 + interval * i, "prompt": prompt, "new": 1} for i, prompt in enumerate(texts[1])]
        time.sleep(PAUSE)
        times = engine.ask("timeline", requests=requests)["times"]
        gaps = sorted(b - a for own in times[:streams] for a, b in itertools.pairwise(own))
        waits = [own[0] - request["at"] for own, request in zip(times[streams:], requests[streams:], strict=True)]
        figures = {
            "gap_p50_ms": 1e3 * statistics.median(gaps),
            "gap_p99_ms": 1e3 * gaps[int(0.99 * len(gaps))],
            "gap_max_ms": 1e3 * gaps[-1],
            "prompt_wait_ms": 1e3 * statistics.median(waits),
            "seconds": max(own[-1] for own in times),
        }
        print(f"  {name:<13}" + "  ".join(f"{key} {value:,.1f}" for key, value in figures.items()), flush=True)
        rows.append({"model": args.model, "workload": "load", "engine": name, "faults": [], **figures})
    return rows


def check_answers(
    engines: dict[str, EngineProcess], runs: dict[str, Runs], model: checkpoints.Model, shape: tuple[int, int, int]
) -> list[str]:
    """What is wrong with Trine's answers, in words; the comparison with Transformers is printed."""
    _, _, output_len = shape
    trine, own = engines["trine"], runs["trine"]
    faults = []
    for tokens in own.tokens:
        wrong = sum(
            len(answer) != output_len or not all(0 <= t < model.config["vocab_size"] for t in answer)
            for answer in tokens
        )
        if wrong:
            faults.append(f"{wrong} of {len(tokens)} answers are not {output_len} tokens of the vocabulary")
    prompts = make_prompts(model, shape, seed=1)
    if statistics.median(own.whole) < LONG:
        _, again = trine.generate(prompts, output_len)
        differ = sum(one != other for one, other in zip(again, own.tokens[0], strict=True))
        if differ:
            faults.append(f"{differ} of {len(again)} answers differ when the same prompts come again")
    if not trine.ask("finite", prompt=prompts[0], tokens=own.tokens[0][0])["finite"]:
        faults.append("log-probabilities are not finite")
    if "transformers" in runs and model.has_weights:
        faults += compare(trine, prompts, own.tokens[0], runs["transformers"].tokens[0])
    return faults


def compare(
    trine: EngineProcess, prompts: list[list[int]], ours: list[list[int]], theirs: list[list[int]]
) -> list[str]:
    """Greedy tokens against Transformers'. Where they part, both tokens must be as good as tied in Trine's own eyes."""
    gaps = []
    for prompt, one, other in zip(prompts, ours, theirs, strict=True):
        place = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        if place is not None:
            gaps.append(trine.ask("gap", prompt=prompt + one[:place], tokens=[one[place], other[place]])["gap"])
    same = len(prompts) - len(gaps)
    line = f"# same tokens as Transformers: {same} of {len(prompts)}"
    if gaps:
        line += f"; where they part, log-probabilities differ by {max(gaps):.3f} at most"
    print(line, flush=True)
    return [
        f"a token differs from Transformers' with a gap of {gap:.3f} in log-probability" for gap in gaps if gap > 0.25
    ]


def print_rows(name: str, shape: tuple[int, int, int], rows: list[dict[str, Any]], faults: list[str]) -> None:
    requests, prompt_len, output_len = shape
    metrics = [
        metric for metric in ("prefill_tok_s", "decode_tok_s", "output_tok_s", "total_tok_s") if metric in rows[0]
    ]
    print(f"\n{name}: {requests} requests, {prompt_len} in, {output_len} out")
    print("  tokens a second of all requests together, Trine's ratio to it, share of the machine's limit")
    for row in rows:
        cells = []
        for metric in metrics:
            share = row["limit_share"].get(metric)
            limit = f" {share:4.0%}" if share is not None else "     "
            cells.append(
                f"{metric.removesuffix('_tok_s'):>7} {row[metric]:>10,.1f} {row['trine_ratio'][metric]:>5.2f}x{limit}"
            )
        print(f"  {row['engine']:<13}" + "  ".join(cells), flush=True)
    for fault in faults:
        print(f"  WRONG: {fault}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
