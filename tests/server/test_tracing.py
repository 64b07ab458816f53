"""Which requests are traced, and what is written of them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.server.serving import identity, serving, write_model
from trine.server.errors import Code, ServerError
from trine.server.request import InferRequest
from trine.server.settings import LogSettings, TraceSettings
from trine.server.tensors import Tensor
from trine.server.tracing import Tracer

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def request(model: str = "m", *, parent: str = "") -> InferRequest:
    made = InferRequest(model, {"IN": Tensor.of("IN", np.array([1, 2], np.int32))}, lambda response: None, id="r")
    made.queued_ns = made.received_ns + 10
    made.compute_start_ns = made.received_ns + 20
    made.compute_input_end_ns = made.received_ns + 30
    made.compute_output_start_ns = made.received_ns + 40
    made.compute_end_ns = made.received_ns + 50
    if parent:
        made.context = {"traceparent": parent}
    return made


def traced(tracer: Tracer, model: str = "m", **options: Any) -> bool:
    made = request(model, **options)
    if tracer.enabled:
        tracer.start(made)
    if made.trace is None:
        return False
    tracer.finish(made)
    return True


async def test_rate_and_count(tmp_path: Path) -> None:
    settings = TraceSettings(file=str(tmp_path / "t"), given={"trace_rate": 3, "trace_count": 2})
    tracer = Tracer(settings)
    assert not any(traced(tracer) for _ in range(5)), "off"
    settings.update("", {"trace_level": ["TIMESTAMPS"]})
    assert [traced(tracer) for _ in range(9)] == [True, False, False, True, False, False, False, False, False]
    settings.update("", {"trace_count": "-1"})
    assert [traced(tracer) for _ in range(4)] == [True, False, False, True]
    settings.update("quiet", {"trace_level": ["OFF"]})
    assert not traced(tracer, "quiet")
    settings.update("", {"trace_level": None})
    assert not tracer.enabled


async def test_computing_ends_no_later_than_its_request(tmp_path: Path) -> None:
    """An instance that answers by itself returns, and is timed, after its answer is on its way."""
    path = tmp_path / "t"
    settings = TraceSettings(file=str(path))
    settings.update("", {"trace_level": ["TIMESTAMPS"], "trace_rate": "1"})
    tracer = Tracer(settings)
    made = request()
    assert tracer.enabled
    tracer.start(made)
    tracer.finish(made)
    made.compute_output_start_ns = made.compute_end_ns = made.received_ns + 3_600_000_000_000
    tracer.flush()
    records = json.loads(path.read_text())
    stamps = {stamp["name"]: stamp["ns"] for stamp in next(r for r in records if "timestamps" in r)["timestamps"]}
    assert stamps["COMPUTE_OUTPUT_START"] == stamps["COMPUTE_END"] == stamps["REQUEST_END"]


async def test_the_file_grows_and_splits(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    settings = TraceSettings(file=str(path), given={"trace_rate": 1, "trace_level": ["TIMESTAMPS", "TENSORS"]})
    tracer = Tracer(settings)
    for expected in (1, 2):
        assert traced(tracer)
        tracer.flush()
        records = json.loads(path.read_text())
        assert [record["id"] for record in records if "model_name" in record] == list(range(1, expected + 1))
    stamps = next(record for record in records if "timestamps" in record)["timestamps"]
    assert [stamp["name"] for stamp in stamps][2:5] == ["REQUEST_START", "QUEUE_START", "COMPUTE_START"]
    tensor = next(record for record in records if "tensor" in record)["tensor"]
    assert tensor == {"name": "IN", "data": "1,2", "shape": "2", "dtype": "INT32"}
    settings.update("", {"log_frequency": "2"})
    for _ in range(4):
        assert traced(tracer)
    tracer.flush()
    for part in ("trace.json.0", "trace.json.1"):
        found = json.loads((tmp_path / part).read_text())
        assert sum("model_name" in record for record in found) == 2


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    received: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
    server.shutdown()
    server.server_close()


async def test_spans_continue_the_callers_trace(collector: tuple[str, list[Any]]) -> None:
    url, received = collector
    settings = TraceSettings(mode="opentelemetry", given={"trace_rate": 1000, "trace_level": ["TIMESTAMPS"]})
    tracer = Tracer(settings, url=url, service="mine")
    assert traced(tracer), "the first of a thousand"
    assert not traced(tracer)
    assert traced(tracer, parent=PARENT), "whoever has a trace is traced"
    assert not traced(tracer, parent=PARENT[:-2] + "00"), "unless it is not sampled"
    await asyncio.sleep(0.15)
    await tracer.close()
    spans = [span for body in received for span in body["resourceSpans"][0]["scopeSpans"][0]["spans"]]
    assert received[0]["resourceSpans"][0]["resource"]["attributes"][0]["value"] == {"stringValue": "mine"}
    roots = [span for span in spans if span["name"] == "InferRequest"]
    assert len(roots) == 2
    assert (roots[1]["traceId"], roots[1]["parentSpanId"]) == (PARENT[3:35], PARENT[36:52])
    parts = [span for span in spans if span["parentSpanId"] == roots[1]["spanId"]]
    assert [span["name"] for span in parts] == ["queue", "compute"]
    assert {span["traceId"] for span in parts} == {PARENT[3:35]}
    assert all(int(span["startTimeUnixNano"]) <= int(span["endTimeUnixNano"]) for span in spans)


async def traced_ensemble(root: Path, tracer: Tracer) -> None:
    """One traced request to an ensemble of two members."""
    identity(root, "first")
    identity(root, "second")
    steps = ", ".join(
        f"""{{ model_name: "{model}" model_version: -1 input_map {{ key: "IN" value: "{source}" }}
        output_map {{ key: "OUT" value: "{target}" }} }}"""
        for model, source, target in (("first", "x", "mid"), ("second", "mid", "y"))
    )
    write_model(
        root,
        "both",
        f"""platform: "ensemble" max_batch_size: 8 input [{{ name: "x" data_type: TYPE_FP32 dims: [4] }}]
        output [{{ name: "y" data_type: TYPE_FP32 dims: [4] }}] ensemble_scheduling {{ step [ {steps} ] }}""",
    )
    async with serving(root) as repository:
        answered = asyncio.Event()
        tensor = Tensor.of("x", np.ones((1, 4), np.float32))
        made = InferRequest("both", {"x": tensor}, lambda response: answered.set(), id="r")
        tracer.start(made)
        repository.model("both").submit(made)
        await asyncio.wait_for(answered.wait(), 10)
        tracer.finish(made)


async def test_an_ensembles_members_are_traced_below_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    tracer = Tracer(TraceSettings(file=str(path), given={"trace_rate": 1, "trace_level": ["TIMESTAMPS"]}))
    await traced_ensemble(tmp_path / "models", tracer)
    tracer.flush()
    records = json.loads(path.read_text())
    named = {record["model_name"]: record for record in records if "model_name" in record}
    assert {name: record.get("parent_id") for name, record in named.items()} == {
        "both": None,
        "first": named["both"]["id"],
        "second": named["both"]["id"],
    }
    stamps = {record["id"]: [stamp["name"] for stamp in record["timestamps"]] for record in records[1::2]}
    assert "HTTP_RECV_START" in stamps[named["both"]["id"]]
    for member in ("first", "second"):
        assert stamps[named[member]["id"]][:3] == ["REQUEST_START", "QUEUE_START", "COMPUTE_START"]
        assert stamps[named[member]["id"]][-1] == "REQUEST_END"


async def test_an_ensembles_spans_are_one_trace(tmp_path: Path, collector: tuple[str, list[Any]]) -> None:
    url, received = collector
    settings = TraceSettings(mode="opentelemetry", given={"trace_rate": 1, "trace_level": ["TIMESTAMPS"]})
    tracer = Tracer(settings, url=url)
    await traced_ensemble(tmp_path, tracer)
    await tracer.close()
    spans = [span for body in received for span in body["resourceSpans"][0]["scopeSpans"][0]["spans"]]
    assert len({span["traceId"] for span in spans}) == 1
    requests = {span["attributes"][0]["value"]["stringValue"]: span for span in spans if span["attributes"]}
    above = requests["both"]["spanId"]
    assert [requests[name]["parentSpanId"] for name in ("both", "first", "second")] == ["", above, above]


async def test_a_collector_that_is_not_there_costs_nothing_but_a_warning() -> None:
    settings = TraceSettings(mode="opentelemetry", given={"trace_rate": 1, "trace_level": ["TIMESTAMPS"]})
    tracer = Tracer(settings, url="http://127.0.0.1:9/v1/traces")
    assert traced(tracer)
    await asyncio.sleep(0.15)
    await tracer.close()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"trace_file": "x"}, Code.UNSUPPORTED),
        ({"trace_level": ["NOTHING"]}, Code.INVALID_ARGUMENT),
        ({"trace_level": 5}, Code.INVALID_ARGUMENT),
        ({"trace_level": ["TIMESTAMPS"]}, Code.INVALID_ARGUMENT),
        ({"trace_rate": "x"}, Code.INVALID_ARGUMENT),
        ({"trace_rate": "-1"}, Code.INVALID_ARGUMENT),
        ({"trace_count": "-2"}, Code.INVALID_ARGUMENT),
        ({"bogus": "1"}, Code.INVALID_ARGUMENT),
    ],
)
def test_wrong_trace_settings_change_nothing(changes: dict[str, Any], code: Code) -> None:
    settings = TraceSettings()
    before = settings.describe()
    with pytest.raises(ServerError) as failure:
        settings.update("", {"trace_rate": "5", **changes})
    assert failure.value.error_code is code
    assert settings.describe() == before


def test_wrong_log_settings_change_nothing() -> None:
    settings = LogSettings()
    before = settings.describe()
    wrong: tuple[dict[str, Any], ...] = ({"log_info": 1}, {"log_verbose_level": -1}, {"log_format": "x"}, {"x": 1})
    for changes in wrong:
        with pytest.raises(ServerError):
            settings.update({"log_warning": False, **changes})
    assert settings.describe() == before
