"""What the HTTP service costs over the engine: streamed tokens/s with many clients against the engine alone, and the
service's CPU time a streamed token.

    python bench/serving_openai.py --model tiny --clients 32 --json result.json

Rounds of two kinds take turns, so that a busy machine is equally busy for both: the engine alone (`LLM.generate` on the
same prompts, in a process of its own), and the service with its engine process, driven by a bare client in this one.
CPU time is that of the service's process alone: neither the engine's nor the client's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from typing import cast

import psutil
import uvloop

SERVE = """
import json, sys
from trine.core.logging import configure
from trine.service.server import serve
from trine.service.settings import ServiceSettings
model, port, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
configure("warning")
sys.exit(serve(model, ServiceSettings(port=port, served_model_names=("bench",)), options))
"""
OFFLINE = """
import json, sys, time
from trine import LLM, SamplingParams
model, options, workload = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.stdin.readline())
llm = LLM(model, **options)
prompts = [{"prompt_token_ids": ids} for ids in workload["prompts"]]
params = SamplingParams(temperature=0, max_tokens=workload["max_tokens"], ignore_eos=True)
llm.generate(prompts, params)
print("ready", flush=True)
for line in sys.stdin:
    started = time.perf_counter()
    outputs = llm.generate(prompts, params)
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(tokens / (time.perf_counter() - started), flush=True)
"""
TOKENS = re.compile(rb'"completion_tokens":(\d+)')


@dataclass
class Streamed:
    """One client's stream. Times in seconds from the request."""

    tokens: int
    chunks: int
    first: float
    total: float


class Client(asyncio.Protocol):
    """Sends one request and counts events; as little work as a client can do."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.done: asyncio.Future[Streamed] = asyncio.get_running_loop().create_future()
        self.tail = b""
        self.chunks = 0
        self.first = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.started = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        if not self.tail and not data.startswith(b"HTTP/1.1 200"):
            self.done.set_exception(RuntimeError(data.decode("utf-8", "replace")))
            self.transport.close()
            return
        if not self.chunks and b"data: " in data:
            self.first = time.perf_counter() - self.started
        self.chunks += data.count(b"data: ")
        self.tail = (self.tail + data)[-1200:]
        if b"data: [DONE]" in self.tail:
            total = time.perf_counter() - self.started
            found = TOKENS.search(self.tail)
            self.done.set_result(Streamed(int(found[1]) if found else 0, self.chunks, self.first, total))
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(f"the connection ended early: {self.tail[-300:]!r}"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def http_request(body: dict[str, object]) -> bytes:
    payload = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(payload) + payload


async def stream_all(port: int, prompts: list[list[int]], max_tokens: int) -> tuple[list[Streamed], float]:
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    clients = []
    for prompt in prompts:
        body: dict[str, object] = {
            "model": "bench",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        _, client = await loop.create_connection(lambda body=body: Client(http_request(body)), "127.0.0.1", port)
        clients.append(client)
    results = await asyncio.gather(*(client.done for client in clients))
    return list(results), time.perf_counter() - started


def wait_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/health/ready", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the service ended before it was ready")


class Engine:
    """The engine alone, in a process of its own."""

    def __init__(self, args: argparse.Namespace, prompts: list[list[int]]) -> None:
        command = [sys.executable, "-c", OFFLINE, args.model, args.engine_options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self._say(json.dumps({"prompts": prompts, "max_tokens": args.max_tokens}))

    def _say(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        return self.process.stdout.readline()

    def round(self) -> float:
        """Tokens a second."""
        return float(self._say(""))

    def stop(self) -> None:
        self.process.communicate()


class Service:
    """The service with its engine."""

    def __init__(self, args: argparse.Namespace, prompts: list[list[int]]) -> None:
        self.port, self.prompts, self.max_tokens = free_port(), prompts, args.max_tokens
        command = [sys.executable, "-c", SERVE, args.model, str(self.port), args.engine_options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_ready(self.port, self.process)
        self.watched = psutil.Process(self.process.pid)
        self.round()

    def round(self) -> dict[str, float]:
        before = self.watched.cpu_times()
        results, seconds = uvloop.run(stream_all(self.port, self.prompts, self.max_tokens))
        after = self.watched.cpu_times()
        tokens = sum(result.tokens for result in results)
        assert tokens == len(self.prompts) * self.max_tokens, tokens
        return {
            "tokens_per_second": tokens / seconds,
            "cpu_us_per_token": (after.user + after.system - before.user - before.system) / tokens * 1e6,
            "of_which_in_the_kernel": (after.system - before.system) / tokens * 1e6,
            "time_to_first_token": median([result.first for result in results]),
            "events_per_token": sum(result.chunks for result in results) / tokens,
        }

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


def measure(args: argparse.Namespace, prompts: list[list[int]]) -> dict[str, float]:
    """Medians over the rounds, and the median of the ratios of neighbouring rounds."""
    engine, service = Engine(args, prompts), Service(args, prompts)
    rounds = []
    try:
        for _ in range(args.rounds):
            offline = engine.round()
            figures = service.round()
            share = figures["tokens_per_second"] / offline
            rounds.append({"offline_tokens_per_second": offline, **figures, "share_of_offline": share})
    finally:
        engine.stop()
        service.stop()
    return {name: median([figures[name] for figures in rounds]) for name in rounds[0]}


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--engine-options", default="{}", help="JSON, as LLM(...) takes them")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    prompts = [[3 + (7 * c + 13 * i) % 250 for i in range(args.prompt_tokens)] for c in range(args.clients)]
    figures = measure(args, prompts)
    for name, value in figures.items():
        print(f"{name:>28} {value:12.3f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"arguments": vars(args), **figures}, file, indent=1)


if __name__ == "__main__":
    main()
