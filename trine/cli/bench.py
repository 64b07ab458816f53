"""`trine bench`: throughput and latency at several levels of concurrency."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from trine.cli.options import MODEL_HELP, add_engine_options, engine_options, positive, positive_list
from trine.cli.terminal import table, waiting

if TYPE_CHECKING:
    from trine.benchmark.load import Level, Target
    from trine.benchmark.tensors import Connection, Outcome

USAGE = "MODEL [options]  |  trine bench --url URL [options]  |  trine bench MODEL --url URL --protocol http|grpc"

DESCRIPTION = """\
Measure a model in this process, or any server with OpenAI's API by its URL: for each level of concurrency, so many
clients send prompts of --input-len and read answers of --output-len tokens, each its next when the last is answered.

With --protocol http or grpc, measure a model of an inference server (Trine or Triton) over the v2 protocol with random
tensors: at levels of concurrency, or at request rates, and what of a request's time it spent where in the server.

TTFT is the time to the first token, ITL the gaps between pieces of a stream, E2E the whole answer; p50 is the median.
Comparisons with other engines, with limits of the machine, are made by bench/llm.py in the repository.
"""

EXAMPLES = """\
examples:
  trine bench tiny
  trine bench ./Qwen2.5-0.5B-Instruct --concurrency 1,8,32 --input-len 512 --output-len 128
  trine bench ./config-only --load-format dummy              speed of a shape, with random weights
  trine bench --url http://127.0.0.1:8000 --concurrency 1,16,64 --json result.json
  trine bench resnet --url http://127.0.0.1:8000 --protocol grpc --batch 8 --request-rate 50,100,200
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=f"{MODEL_HELP}; with --url, the name there")
    parser.add_argument("--url", help="measure this server instead, for example http://127.0.0.1:8000")
    parser.add_argument("--api-key", metavar="KEY", help="for --url (default: the variable TRINE_API_KEY)")
    parser.add_argument("--chat", action="store_true", help="for --url: ask /v1/chat/completions")
    parser.add_argument(
        "--honour-eos", action="store_true", help="for --url: answers may end early; for servers that refuse ignore_eos"
    )
    parser.add_argument(
        "--concurrency",
        type=positive_list,
        default=[1, 4, 16],
        metavar="N,N,…",
        help="levels, one after the other (default: 1,4,16)",
    )
    parser.add_argument(
        "--requests", type=positive, metavar="N", help="requests a level (default: 4 a client, 16 at least)"
    )
    parser.add_argument(
        "--input-len", type=positive, default=128, metavar="N", help="tokens a prompt (words, for --url; default: 128)"
    )
    parser.add_argument("--output-len", type=positive, default=64, metavar="N", help="tokens an answer (default: 64)")
    tensors = parser.add_argument_group("v2 protocol")
    tensors.add_argument(
        "--protocol", default="openai", choices=("openai", "http", "grpc"), help="of --url (default: openai)"
    )
    tensors.add_argument("--grpc-url", metavar="URL", help="for grpc (default: the port after that of --url)")
    tensors.add_argument("--batch", type=positive, default=1, metavar="N", help="rows a request (default: 1)")
    tensors.add_argument(
        "--shape", action="append", default=[], metavar="INPUT:N,N", help="of an input with variable dimensions"
    )
    tensors.add_argument("--request-rate", type=positive_list, metavar="N,N,…", help="requests a second, in turn")
    tensors.add_argument("--seconds", type=float, default=5.0, metavar="S", help="a level (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too; - for standard output")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    from trine.core.errors import ConfigurationError

    if args.model is None and args.url is None:
        raise ConfigurationError("give a MODEL to load, for example `trine bench tiny`, or --url of a server")
    if args.protocol != "openai":
        return run_tensors(args)
    levels = asyncio.run(measure_server(args) if args.url else measure_engine(args))
    summaries = [level.summary() for level in levels]
    report = {
        "model": args.model,
        "url": args.url,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "levels": summaries,
    }
    if args.json == "-":
        print(json.dumps(report))
    else:
        print(format_levels(summaries))
    if args.json and args.json != "-":
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    errors = [answer.error for level in levels for answer in level.answers if answer.error]
    if errors:
        print(f"trine: error: {len(errors)} requests failed, the first with: {errors[0]}", file=sys.stderr)
        return 1
    return 0


def run_tensors(args: argparse.Namespace) -> int:
    """Measure a model over the v2 protocol."""
    from trine.core.errors import ConfigurationError

    if args.model is None or args.url is None:
        raise ConfigurationError("--protocol http and grpc need the model's name and --url of the server")
    outcomes = asyncio.run(measure_tensors(args))
    summaries = [outcome.summary() for outcome in outcomes]
    report = {"model": args.model, "url": args.url, "protocol": args.protocol, "batch": args.batch, "levels": summaries}
    if args.json == "-":
        print(json.dumps(report))
    else:
        columns = [key for key in max(summaries, key=len) if key != "requests"]
        print(
            table([key.replace("_", " ") for key in columns], [[row.get(key) for key in columns] for row in summaries])
        )
    if args.json and args.json != "-":
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    failures = [failure for outcome in outcomes for failure in outcome.failures]
    if failures:
        print(f"trine: error: {len(failures)} requests failed, the first with: {failures[0]}", file=sys.stderr)
        return 1
    return 0


async def measure_tensors(args: argparse.Namespace) -> list[Outcome]:
    from trine.benchmark import tensors as v2

    path = f"/v2/models/{args.model}"
    metadata = v2.ask_json(args.url, path)
    config = v2.ask_json(args.url, f"{path}/config")
    shapes = {}
    for item in args.shape:
        name, _, dims = item.rpartition(":")
        shapes[name] = positive_list(dims)
    inputs = v2.random_inputs(metadata, config["max_batch_size"] > 0, args.batch, shapes)
    grpc_url = args.grpc_url or next_port(args.url)

    def connect() -> Connection:
        if args.protocol == "grpc":
            return v2.GrpcConnection(grpc_url, args.model, inputs)
        return v2.HttpConnection(args.url, args.model, inputs)

    outcomes = []
    for level in args.request_rate or args.concurrency:
        before = v2.ask_json(args.url, f"{path}/stats")["model_stats"][-1]
        run_level = v2.open_loop if args.request_rate else v2.closed_loop
        outcome = await run_level(connect, level, args.seconds)
        outcome.rows = args.batch
        outcome.server = v2.server_parts(before, v2.ask_json(args.url, f"{path}/stats")["model_stats"][-1])
        outcomes.append(outcome)
    return outcomes


def next_port(url: str) -> str:
    """gRPC's usual place beside HTTP's."""
    from urllib.parse import urlsplit

    place = urlsplit(url)
    return f"grpc://{place.hostname or '127.0.0.1'}:{(place.port or 8000) + 1}"


async def measure_engine(args: argparse.Namespace) -> list[Level]:
    from trine.benchmark.engine_target import EngineTarget
    from trine.llm.api import AsyncLLM

    engine = AsyncLLM(args.model, engine_process=False, **engine_options(args))
    try:
        with waiting(f"loading {args.model}"):
            await engine.start()
        return await sweep(EngineTarget(engine, args.input_len, args.output_len), args)
    finally:
        await engine.close()


async def measure_server(args: argparse.Namespace) -> list[Level]:
    from trine.benchmark.http_target import HttpTarget, first_model

    key = args.api_key or os.environ.get("TRINE_API_KEY")
    model = args.model or await first_model(args.url, key)
    target = HttpTarget(
        args.url, model, args.input_len, args.output_len, chat=args.chat, ignore_eos=not args.honour_eos, api_key=key
    )
    try:
        return await sweep(target, args)
    finally:
        target.close()


async def sweep(target: Target, args: argparse.Namespace) -> list[Level]:
    """Each level in turn, after a request that warms up; every request of the run has its own prompt."""
    from tqdm import tqdm

    from trine.benchmark.load import run_level

    levels = [await run_level(target, 1, 1)]
    sent = 1
    for concurrency in args.concurrency:
        count = args.requests or max(16, 4 * concurrency)
        label = f"{concurrency} client{'s' if concurrency > 1 else ''}"
        with tqdm(total=count, desc=label, unit="request", disable=not sys.stderr.isatty(), leave=False) as bar:
            levels.append(await run_level(target, concurrency, count, sent, bar.update))
        sent += count
    return levels[1:]


def format_levels(summaries: list[dict[str, Any]]) -> str:
    columns = {
        "clients": "concurrency",
        "req/s": "requests_per_s",
        "out tok/s": "output_tokens_per_s",
        "all tok/s": "total_tokens_per_s",
        "TTFT p50 ms": "ttft_p50_ms",
        "p99": "ttft_p99_ms",
        "ITL p50 ms": "itl_p50_ms",
        "p99 ": "itl_p99_ms",
        "E2E p50 ms": "e2e_p50_ms",
        "p99  ": "e2e_p99_ms",
        "failed": "failed",
    }
    return table(list(columns), [[summary[key] for key in columns.values()] for summary in summaries])
