"""Keys, overload, draining, hanging up, errors in the middle: what a client meets when things are not ordinary."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.conftest import Running, Start
from trine.core.errors import ConfigurationError
from trine.server.listening import listen
from trine.service.settings import ServiceSettings

LONG = {"model": "small", "prompt": "abc", "max_tokens": 400, "ignore_eos": True, "temperature": 0}
SHORT = {"model": "small", "prompt": "abc", "max_tokens": 4, "ignore_eos": True, "temperature": 0}


def events(text: str) -> list[Any]:
    return [json.loads(part[6:]) for part in text.split("\n\n") if part.startswith("data: {")]


async def counted(service: Running, status: int) -> float:
    text = (await service.client.get("/metrics")).text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if f'status="{status}"' in line)


async def test_keys(start: Start) -> None:
    service = await start({"api_keys": ("first", "second")})
    for path, method in (("/v1/completions", "POST"), ("/v1/models", "GET"), ("/tokenize", "POST")):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic first"}):
            answer = await service.client.request(method, path, json=SHORT, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    for key in ("first", "second"):
        answer = await service.post("/v1/completions", SHORT, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 200
    for path in ("/health", "/v1/health/ready", "/metrics", "/docs", "/"):
        assert (await service.client.get(path)).status_code == 200


async def test_beyond_the_queue_requests_are_refused_not_dropped(start: Start) -> None:
    service = await start(max_num_seqs=2, max_waiting=2)
    answers = await asyncio.gather(*(service.post("/v1/completions", LONG) for _ in range(12)))
    statuses = sorted(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 4
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert int(refused.headers["retry-after-ms"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert await counted(service, 429) == statuses.count(429)
    assert (await service.post("/v1/completions", SHORT)).status_code == 200


async def test_all_prompts_of_a_request_are_taken_or_none(start: Start) -> None:
    service = await start(max_num_seqs=2, max_waiting=1)
    many = {**SHORT, "prompt": ["a", "b", "c", "d"]}
    assert (await service.post("/v1/completions", many)).status_code == 429
    await service.until(lambda: service.engine.num_requests == 0)
    assert (await service.post("/v1/completions", {**SHORT, "prompt": ["a", "b"]})).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_up_stops_the_work(start: Start, stream: bool) -> None:
    service = await start()
    task = asyncio.create_task(service.post("/v1/completions", {**LONG, "stream": stream, "n": 3}))
    await service.until(lambda: service.engine.stats.generated_tokens > 10)
    task.cancel()
    await service.until(lambda: service.engine.num_requests == 0 and service.app.service.active == 0)
    assert await counted(service, 499) == 1
    before = service.engine.stats.generated_tokens
    await service.post("/v1/completions", SHORT)
    assert service.engine.stats.generated_tokens < before + 50


async def test_the_checkpoint_advises_how_to_sample(start: Start, checkpoint: Path, tmp_path: Path) -> None:
    advised = shutil.copytree(checkpoint, tmp_path / "advised")
    (advised / "generation_config.json").write_text('{"temperature": 0.0}')
    service = await start(model=advised)

    async def text(**fields: Any) -> str:
        body = {"model": "small", "prompt": "abc", "max_tokens": 12, "ignore_eos": True, **fields}
        answer = await service.post("/v1/completions", body)
        return str(answer.json()["choices"][0]["text"])

    greedy = await text(temperature=0)
    assert [await text() for _ in range(3)] == [greedy] * 3
    assert {await text(temperature=5.0) for _ in range(3)} != {greedy}


async def test_before_the_engine_is_ready(start: Start) -> None:
    service = await start()
    service.engine.is_ready = False
    for path in ("/v1/health/ready", "/health"):
        answer = await service.client.get(path)
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
    assert (await service.client.get("/v1/health/live")).status_code == 200
    answer = await service.post("/v1/completions", SHORT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "service_unavailable")
    assert int(answer.headers["retry-after"]) >= 1
    assert (await service.post("/v1/completions", {**SHORT, "model": "other"})).status_code == 404
    service.engine.is_ready = True
    assert (await service.post("/v1/completions", SHORT)).status_code == 200


async def test_draining_finishes_what_runs_and_takes_no_more(start: Start) -> None:
    service = await start()
    running = asyncio.create_task(service.post("/v1/completions", {**LONG, "stream": True}))
    await service.until(lambda: service.engine.num_requests == 1)
    service.app.service.draining = True
    refused = await service.post("/v1/completions", SHORT)
    assert refused.status_code == 503
    assert "shutting down" in refused.json()["error"]["message"]
    assert (await service.client.get("/v1/health/ready")).status_code == 503
    answer = await running
    assert answer.text.endswith("data: [DONE]\n\n")
    assert events(answer.text)[-1]["choices"][0]["finish_reason"] == "length"


async def test_a_killed_engine_is_an_error_to_its_requests_and_a_restart(start: Start) -> None:
    service = await start(engine_process=True)
    streamed = asyncio.create_task(service.post("/v1/completions", {**LONG, "stream": True, "n": 8}))
    whole = asyncio.create_task(service.post("/v1/completions", {**LONG, "n": 8}))
    await service.until(lambda: service.engine.stats.generated_tokens > 20)
    os.kill(service.engine._transport.pid, signal.SIGKILL)  # type: ignore[union-attr]
    async with asyncio.timeout(2):
        answers = await asyncio.gather(streamed, whole)
    assert answers[0].status_code == 200
    last = events(answers[0].text)[-1]
    assert last["error"]["code"] == "engine_unavailable"
    assert answers[0].text.endswith("data: [DONE]\n\n")
    assert answers[1].status_code == 503
    assert int(answers[1].headers["retry-after"]) >= 1
    assert await counted(service, 503) >= 2
    await service.until(lambda: service.engine.is_ready, 60)
    assert (await service.post("/v1/completions", SHORT)).status_code == 200
    assert "engine_restarts_total" in (await service.client.get("/metrics")).text


async def test_an_error_of_ours_says_so_and_nothing_more(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    service = await start()
    monkeypatch.setattr(service.engine, "stream", lambda *args, **kwargs: 1 / 0)
    answer = await service.post("/v1/completions", SHORT, headers={"x-request-id": "find-me"})
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert error["type"] == "server_error"
    assert "find-me" in error["message"]
    assert "division" not in answer.text
    assert service.app.service.active == 0


async def test_nothing_leaks(start: Start) -> None:
    """Requests of every kind, a third cancelled, some malformed: at the end nothing runs and no block is used."""
    service = await start(max_num_seqs=16)
    draw = random.Random(7)

    async def one() -> int:
        body: dict[str, Any] = {
            "model": "small",
            "prompt": ["x" * draw.randint(1, 60) for _ in range(draw.choice([1, 1, 3]))],
            "max_tokens": draw.randint(1, 40),
            "stream": draw.random() < 0.5,
            "n": draw.choice([1, 1, 2]),
            "temperature": draw.choice([0, 1]),
            "stop": draw.choice([None, "a"]),
            "logprobs": draw.choice([None, 2]),
        }
        if draw.random() < 0.05:
            body[draw.choice(["n", "what", "stop"])] = {}
        task = asyncio.create_task(service.post("/v1/completions", body))
        if draw.random() < 0.3:
            await asyncio.sleep(draw.random() * 0.3)
            task.cancel()
        try:
            return (await task).status_code
        except (asyncio.CancelledError, httpx.HTTPError):
            return 0

    statuses = []
    for _ in range(12):
        statuses += await asyncio.gather(*(one() for _ in range(16)))
    assert set(statuses) <= {0, 200, 400}
    assert statuses.count(200) > 50
    await service.until(lambda: service.engine.num_requests == 0 and service.app.service.active == 0)
    assert (await service.post("/v1/completions", SHORT)).status_code == 200
    await service.until(lambda: service.engine.stats.blocks_used == 0)


async def test_slow_readers_hold_up_nobody(start: Start) -> None:
    service = await start()
    host, port = service.client.base_url.host, service.client.base_url.port
    reader, writer = await asyncio.open_connection(host, port, limit=1)
    body = json.dumps({**LONG, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    assert (await service.post("/v1/completions", SHORT)).status_code == 200
    await service.until(lambda: service.engine.num_requests == 0)
    received = b""
    while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        received += await asyncio.wait_for(reader.read(100), 10)
    writer.close()


def test_a_port_in_use_is_told_in_a_line() -> None:
    with listen("127.0.0.1", 0, "--port") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"port {port} .* in use.*--port"):
            listen("127.0.0.1", port, "--port")
    with pytest.raises(ConfigurationError, match="not an address"):
        listen("no.such.host.invalid", 0, "--port")


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", 70000), ("max_body_bytes", 10), ("drain_timeout", -1.0), ("api_keys", ("",))],
)
def test_settings_that_can_not_be(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ServiceSettings(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize("name", ["tool_parser", "reasoning_parser"])
async def test_parsers_that_are_not_there(start: Start, name: str) -> None:
    with pytest.raises(ConfigurationError, match="nonsense"):
        await start({name: "nonsense"})
