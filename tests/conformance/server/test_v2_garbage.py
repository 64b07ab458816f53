"""A request leaves nothing for the garbage collector, whose pauses all other requests would wait through."""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import queue
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from tests.conformance.server.v2 import KINDS, Client, RunningServer


def left_behind(action: Callable[[], Any], server: RunningServer) -> list[str]:
    """The types of the server's objects that only the collector would have freed after `action`."""
    action()  # what is kept from the first time on is no garbage
    server.in_loop(lambda: None)
    gc.collect()
    before = gc.get_debug()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        action()
        server.in_loop(lambda: None)
        gc.collect()
        found = [type(found) for found in gc.garbage]
    finally:
        gc.set_debug(before)
        gc.garbage.clear()
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in found if kind.__module__.startswith("trine.")]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_errors_leave_nothing(kind: str, v2: RunningServer) -> None:
    client = Client(kind, v2)
    numbers = np.arange(16, dtype=np.int32).reshape(1, 16)
    floats = np.arange(4, dtype=np.float32).reshape(1, 2, 2)

    def requests() -> None:
        client.add_sub(numbers, numbers)
        client.infer("identity_2d", [client.input("INPUT0", floats, "FP32")])
        client.infer("accumulate", [client.input("INPUT", numbers[:, :1], "INT32")], sequence_id=7,
                     sequence_start=True, sequence_end=True)  # fmt: skip
        for model, name in (("failing", "IN"), ("failing", "WRONG"), ("missing", "IN")):
            with contextlib.suppress(InferenceServerException):
                client.infer(model, [client.input(name, np.ones([1], np.int32), "INT32")])

    try:
        assert left_behind(requests, v2) == []
    finally:
        client.close()


def test_generate_leaves_nothing(v2: RunningServer) -> None:
    connection = http.client.HTTPConnection(v2.http)

    def requests() -> None:
        for path, times in (("generate", 1), ("generate", 2), ("generate_stream", 3)):
            body = json.dumps({"text_input": "words", "times": times})
            connection.request("POST", f"/v2/models/text/{path}", body)
            assert connection.getresponse().read()

    try:
        assert left_behind(requests, v2) == []
    finally:
        connection.close()


def test_streams_leave_nothing(v2: RunningServer) -> None:
    client = Client("grpc", v2)
    answers: queue.Queue[Any] = queue.Queue()

    def requests() -> None:
        client.raw.start_stream(lambda result, error: answers.put(error or result))
        for count in (3, -1):
            tensor = client.input("IN", np.array([count], np.int32), "INT32")
            client.raw.async_stream_infer("repeat", [tensor])
        for _ in range(5):
            answers.get(timeout=10)
        client.raw.stop_stream()

    try:
        assert left_behind(requests, v2) == []
    finally:
        client.close()
