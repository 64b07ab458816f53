"""Thousands of random requests against a server: nothing may be lost, leaked or left running.

    python bench/soak.py [--model tiny] [--requests 10000] [--concurrency 48] [--json FILE]
    python bench/soak.py --url http://127.0.0.1:8000 --pid PID

30 % of the requests hang up at a random moment, 5 % are malformed. Every other one must be answered in full. At the end
no sequence may run or wait and no cache block be in use; the memory of the server's processes is sampled throughout,
and its growth over the last half is reported. Exit code 1 when any of this fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

CANCELLED, MALFORMED = 0.30, 0.05
WORDS = ("river", "stone", "light", "paper", "seven", "under", "moves", "quickly", "blue", "and", "number", "list")


@dataclass
class Report:
    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)


def random_body(rng: random.Random) -> tuple[str, dict[str, object]]:
    """A path and a valid body with a random choice of what the API offers."""
    prompt = " ".join(rng.choices(WORDS, k=rng.randrange(1, 300)))
    body: dict[str, object] = {
        "model": MODEL,
        "max_tokens": rng.choice([1, 4, 16, 40, 120]),
        "stream": rng.random() < 0.6,
    }
    options: dict[str, object] = {
        "temperature": rng.choice([0, 0.7, 1.3]),
        "top_p": rng.choice([0.5, 0.95]),
        "top_k": rng.choice([1, 20]),
        "seed": rng.randrange(1 << 31),
        "n": rng.choice([1, 2, 3]),
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": -10},
        "stop": rng.choice(["e", ["the", "zz"]]),
        "ignore_eos": True,
        "min_tokens": 1,
        "priority": rng.randrange(3),
    }
    for name in rng.sample(sorted(options), rng.randrange(5)):
        body[name] = options[name]
    if rng.random() < 0.1:
        body["response_format"] = {"type": "json_object"}
    if body["stream"] and rng.random() < 0.5:
        body["stream_options"] = {"include_usage": True}
    if rng.random() < 0.5 and "response_format" not in body:
        if rng.random() < 0.3:
            body["logprobs"] = 2
        return "/v1/completions", body | {"prompt": prompt}
    return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": prompt}]}


def malformed(rng: random.Random) -> tuple[str, bytes]:
    """A body that must be answered with a 4xx."""
    path, body = random_body(rng)
    text = json.dumps(body)
    return path, rng.choice(
        [
            text[: rng.randrange(1, len(text) - 1)],
            json.dumps(body | {"max_tokens": "many"}),
            json.dumps(body | {"temperatur": 1}),
            json.dumps(body | {"model": "another"}),
            json.dumps(body | {"max_tokens": 10**9}),
            json.dumps(body | {"temperature": -1}),
            json.dumps([body]),
            "",
        ]
    ).encode()


class Client:
    def __init__(self, host: str, port: int, report: Report) -> None:
        self.host, self.port, self.report = host, port, report

    async def send(self, rng: random.Random) -> None:
        kind = rng.random()
        if kind < MALFORMED:
            await self._expect_refusal(*malformed(rng))
        else:
            path, body = random_body(rng)
            hang_up = rng.expovariate(1 / 0.15) if kind < MALFORMED + CANCELLED else None
            await self._exchange(path, body, hang_up)

    async def _exchange(self, path: str, body: dict[str, object], hang_up: float | None) -> None:
        try:
            async with asyncio.timeout(hang_up):
                status, answer = await self._post(path, json.dumps(body).encode())
        except TimeoutError:
            self.report.outcomes["cancelled"] += 1
            return
        if status in (429, 503):
            self.report.outcomes["refused"] += 1
        elif status != 200:
            self._problem(f"{status} for {json.dumps(body)[:300]}: {answer[:300]!r}")
        elif body["stream"] and not answer.rstrip().endswith(b"data: [DONE]"):
            self._problem(f"stream without an end: …{answer[-200:]!r}")
        elif not body["stream"] and len(json.loads(answer)["choices"]) != body.get("n", 1):
            self._problem(f"wrong number of choices: {answer[:200]!r}")
        else:
            self.report.outcomes["answered"] += 1

    async def _expect_refusal(self, path: str, data: bytes) -> None:
        status, answer = await self._post(path, data)
        if 400 <= status < 500 and "message" in json.loads(answer)["error"]:
            self.report.outcomes["malformed refused"] += 1
        else:
            self._problem(f"malformed {data[:200]!r} was answered with {status} {answer[:200]!r}")

    async def _post(self, path: str, data: bytes) -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            head = (
                f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
            )
            writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data)
            answer = await reader.read(-1)
        finally:
            writer.transport.abort()
        head_bytes, _, body = answer.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in head_bytes.lower():
            body = unchunk(body)
        return int(head_bytes.split(b" ", 2)[1]), body

    def _problem(self, text: str) -> None:
        self.report.outcomes["problem"] += 1
        self.report.problems.append(text)


def unchunk(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        parts.append(body[:length])
        body = body[length + 2 :]
        if length == 0:
            break
    return b"".join(parts)


def resident_bytes(process: psutil.Process) -> int:
    return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])


def read_metrics(url: str) -> dict[str, float]:
    text = urllib.request.urlopen(url + "/v1/metrics", timeout=10).read().decode()
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name.split("{")[0]: float(value) for name, value in lines}


async def soak(arguments: argparse.Namespace, url: str, process: psutil.Process) -> Report:
    report = Report()
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    client = Client(host, int(port), report)
    numbers = iter(range(arguments.requests))
    started = time.monotonic()

    async def worker() -> None:
        for number in numbers:
            await client.send(random.Random(f"{arguments.seed}/{number}"))
            if number % 50 == 0:
                report.memory.append((time.monotonic() - started, resident_bytes(process)))
            if number % 1000 == 0:
                print(f"{number} of {arguments.requests}: {dict(report.outcomes)}", file=sys.stderr, flush=True)

    await asyncio.gather(*(worker() for _ in range(arguments.concurrency)))
    return report


def judge(report: Report, url: str, requests: int) -> dict[str, object]:
    """The figures, and what is wrong with them."""
    for _ in range(50):
        metrics = read_metrics(url)
        left = {
            name: metrics[name] for name in ("num_requests_running", "num_requests_waiting", "gpu_cache_usage_perc")
        }
        if not any(left.values()):
            break
        time.sleep(0.1)
    problems = list(report.problems)
    if any(left.values()):
        problems.append(f"something is left in the engine: {left}")
    if sum(report.outcomes.values()) != requests:
        problems.append(f"{requests - sum(report.outcomes.values())} requests have no outcome")
    if metrics["engine_restarts_total"]:
        problems.append(f"the engine was restarted {metrics['engine_restarts_total']:.0f} times")
    samples = [memory for _, memory in report.memory]
    middle = statistics.median(samples[len(samples) // 2 : len(samples) * 5 // 8])
    end = statistics.median(samples[len(samples) * 7 // 8 :])
    growth = end / middle - 1
    if growth > 0.05:
        problems.append(f"memory grew by {growth:.1%} over the last half")
    return {
        "requests": requests,
        "outcomes": dict(report.outcomes),
        "seconds": round(report.memory[-1][0], 1),
        "memory_mb": [round(samples[0] / 1e6), round(middle / 1e6), round(end / 1e6)],
        "memory_growth_last_half": round(growth, 4),
        "left_in_engine": left,
        "problems": problems[:20],
    }


def main() -> int:
    global MODEL
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; without it one is started")
    parser.add_argument("--pid", type=int, help="the running server's process, whose memory is watched")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    MODEL = arguments.model
    server = None
    if arguments.url is None:
        command = [sys.executable, "-m", "trine.cli.main", "serve", MODEL, "--port", str(arguments.port)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        arguments.url, arguments.pid = f"http://127.0.0.1:{arguments.port}", server.pid
    try:
        wait_until_ready(arguments.url)
        report = asyncio.run(soak(arguments, arguments.url, psutil.Process(arguments.pid)))
        result = judge(report, arguments.url, arguments.requests)
    finally:
        if server is not None:
            server.terminate()
            server.wait(30)
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result))
    return 1 if result["problems"] else 0


def wait_until_ready(url: str) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(url + "/v1/health/ready", timeout=5)
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise SystemExit(f"{url} does not get ready")


MODEL = "tiny"

if __name__ == "__main__":
    sys.exit(main())
