"""Fuzzed HTTP and gRPC messages: no crash, no 5xx, no hang, memory flat.

CI sends some thousands; TRINE_FUZZ=100000 sends as many as one wants, TRINE_FUZZ_SEED=1000000 others.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conformance.server.v2 import RunningServer, write_repository
from tests.server.fuzz.mutation import Maker
from trine.server.application import ServerSettings
from trine.server.grpc import frames
from trine.server.grpc.heads import HeadReader
from trine.server.repository import RepositorySettings

MESSAGES = int(os.environ.get("TRINE_FUZZ", "4000"))
FIRST = int(os.environ.get("TRINE_FUZZ_SEED", "0"))
_STATUS = re.compile(rb"HTTP/1\.1 (\d\d\d)")
_SERVER_ERRORS = {"13", "2"}  # INTERNAL, UNKNOWN


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    root = tmp_path_factory.mktemp("fuzzed")
    write_repository(root)
    repository = RepositorySettings(
        directories=(str(root),), control_mode="explicit", load_models=("*",), drain_seconds=2.0
    )
    running = RunningServer(repository, ServerSettings(max_body=1 << 20, drain_seconds=2.0, client_shared_memory=True))
    yield running
    running.close()


def connect(url: str) -> socket.socket:
    host, _, port = url.partition(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def exchange(url: str, data: bytes) -> bytes:
    """Everything the server answers until it has closed; a reset counts as the end, silence as a failure."""
    received = bytearray()
    with connect(url) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 16):
                received += part
        except ConnectionError:
            pass
    return bytes(received)


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def is_well(server: RunningServer) -> None:
    answer = exchange(server.http, b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


def test_http(server: RunningServer) -> None:
    statuses: dict[int, int] = {}
    before = 0
    for seed in range(MESSAGES):
        if seed == MESSAGES // 4:
            before = resident()
        request = Maker(FIRST + seed).http()
        answer = exchange(server.http, request)
        for found in _STATUS.findall(answer):
            status = int(found)
            statuses[status] = statuses.get(status, 0) + 1
            assert status < 500 or status in (501, 503), (seed, request, answer)
    assert statuses.get(200, 0) > MESSAGES // 40
    assert statuses.get(400, 0) > MESSAGES // 20
    assert resident() - before < 64 << 20
    is_well(server)


def statuses_of(answer: bytes) -> list[str]:
    """The grpc-status of each call in what the server sent."""
    found, position, reader = [], 0, HeadReader()
    while len(answer) - position >= frames.HEADER_SIZE:
        high, low, kind, _, _ = frames.unpack_header(answer, position)
        start = position + frames.HEADER_SIZE
        position = start + (high << 8 | low)
        if kind == frames.HEADERS:
            status = reader.read(answer[start:position]).metadata.get("grpc-status")
            if status is not None:
                found.append(status)
    return found


def test_grpc(server: RunningServer) -> None:
    seen: dict[str, int] = {}
    before = 0
    greeting = frames.PREFACE + frames.settings({})
    calls = 10  # of one connection
    for seed in range(MESSAGES // calls):
        if seed == MESSAGES // calls // 4:
            before = resident()
        maker = Maker(FIRST + seed)
        data = greeting + b"".join(maker.call(1 + 2 * index) for index in range(calls))
        answer = exchange(server.grpc, maker.broken(data) if seed % 10 == 0 else data)
        for status in statuses_of(answer):
            seen[status] = seen.get(status, 0) + 1
            assert status not in _SERVER_ERRORS, (seed, status)
    assert seen.get("0", 0) > 0  # the end of the connection cancels what does not run at once
    assert seen.get("3", 0) > MESSAGES // 100
    assert resident() - before < 64 << 20
    is_well(server)
    assert not server.in_loop(lambda: [c for c in server.server.edges.grpc_server.connections if c.streams])


def test_random_bytes(server: RunningServer, tmp_path: Path) -> None:
    for seed in range(200):
        noise = Maker(FIRST + seed).random.randbytes(1 + seed * 7)
        exchange(server.http, noise)
        exchange(server.grpc, noise)
        exchange(server.grpc, frames.PREFACE + noise)
    is_well(server)
