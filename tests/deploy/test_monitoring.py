"""The Grafana dashboard and the alert rules ask for what a live server has; where Prometheus is, it answers them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import yaml

from tests.server.backends.served import write_model
from tests.service.process import Process

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
VARIABLES = {"$__rate_interval": "30s", "$job": ".*", "$model": ".*"}
IDENTITY = """
    backend: "identity" max_batch_size: 8 dynamic_batching { }
    input { name: "IN" data_type: TYPE_FP32 dims: [ 4 ] }
    output { name: "OUT" data_type: TYPE_FP32 dims: [ 4 ] }
"""
SCRAPED = {"job", "instance"}
"""Labels that Prometheus adds."""


def panel_queries() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana" / "trine.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def filled(query: str) -> str:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    return query


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("models")
    write_model(folder, "echo", IDENTITY, {"1/keep": ""})
    config = """backend: "llm" parameters { key: "model" value { string_value: "tiny" } }
        parameters { key: "cache_bytes" value { string_value: "256MiB" } }"""
    write_model(folder, "words", config, {"1/keep": ""})
    process = Process("--model-repository", str(folder))
    use(process)
    yield process
    assert process.stop() == 0


def use(server: Process) -> None:
    """Requests of every kind, good and bad."""
    url = f"http://{server.http}"
    tensor = {"name": "IN", "datatype": "FP32", "shape": [1, 4], "data": [0.0] * 4}
    assert httpx.post(f"{url}/v2/models/echo/infer", json={"inputs": [tensor]}).status_code == 200
    assert httpx.post(f"{url}/v2/models/echo/infer", json={"inputs": []}).status_code == 400
    generate = {"text_input": "Count: 1 2 3", "max_tokens": 4}
    assert httpx.post(f"{url}/v2/models/words/generate", json=generate).status_code == 200
    body = {"model": "words", "prompt": "Count: 1 2 3", "max_tokens": 8}
    assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200


def selectors(expression: Any) -> Iterator[Any]:
    """Every vector selector in an expression."""
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
    for name in ("expr", "lhs", "rhs", "vector_selector", "vs"):
        inner = getattr(expression, name, None)
        if inner is not None:
            yield from selectors(inner)
    for inner in getattr(expression, "args", None) or ():
        yield from selectors(inner)


def groupings(query: str) -> set[str]:
    return {label.strip() for found in re.findall(r"\b(?:by|without) \(([^)]*)\)", query) for label in found.split(",")}


@pytest.fixture(scope="module")
def live(server: Process) -> dict[str, set[str]]:
    """Names of the samples on the metrics page, and their labels."""
    found: dict[str, set[str]] = {"up": set()}
    for line in httpx.get(f"http://{server.metrics}/metrics").text.splitlines():
        if not line.startswith("#"):
            name, labels = re.fullmatch(r"(\w+)(?:\{(.*)\})? \S+", line).groups()  # type: ignore[union-attr]
            found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels or ""))
    return found


@pytest.mark.parametrize("query", [*panel_queries(), *(rule["expr"] for rule in rules())])
def test_queries_ask_for_what_there_is(live: dict[str, set[str]], query: str) -> None:
    chosen = list(selectors(promql_parser.parse(filled(query))))
    assert chosen
    labels: set[str] = set()
    for selector in chosen:
        assert selector.name in live, f"no metric {selector.name}"
        known = live[selector.name] | SCRAPED
        labels |= known
        assert {matcher.name for matcher in selector.matchers.matchers} <= known
    assert groupings(query) <= labels


def test_texts_name_labels_that_their_rules_keep() -> None:
    for rule in rules():
        used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        kept = groupings(rule["expr"]) or {"model", "model_name", *SCRAPED}
        assert used <= kept, rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_panels_lie_side_by_side() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "trine.json").read_text())
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        own = {(x, y) for x in columns for y in rows}
        assert not own & cells, panel["title"]
        assert columns.stop <= 24
        cells |= own
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed: apt-get install prometheus"
)
def test_prometheus_answers_every_query(server: Process, tmp_path: Path) -> None:
    for name in ("prometheus.yml", "rules.yml"):
        text = (DEPLOY / "prometheus" / name).read_text()
        (tmp_path / name).write_text(text.replace("127.0.0.1:8002", server.metrics).replace("10s", "500ms"))
    checked = subprocess.run(
        ["promtool", "check", "config", tmp_path / "prometheus.yml"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    options = (f"--storage.tsdb.path={tmp_path / 'data'}", "--web.listen-address=127.0.0.1:0")
    command = ["prometheus", f"--config.file={tmp_path / 'prometheus.yml'}", *options]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        address = until(lambda: re.search(r"Listening on.* address=(127\.0\.0\.1:\d+)", log.read_text()))[1]
        until(lambda: answers(address, 'count_over_time(up{job="trine"}[1m]) > 4'))
        use(server)
        until(lambda: answers(address, "sum(rate(nv_inference_request_success[30s])) > 0"))
        empty = [query for query in panel_queries() if not answers(address, filled(query))]
        assert not empty
        for rule in rules():
            assert query_status(address, rule["expr"]) == "success"
        loaded = httpx.get(f"http://{address}/api/v1/rules").json()["data"]["groups"]
        assert sum(len(group["rules"]) for group in loaded) == len(rules())
    finally:
        process.terminate()
        process.wait(30)


def answers(address: str, query: str) -> list[Any]:
    """What a query finds; nothing while Prometheus is starting."""
    try:
        answer = httpx.get(f"http://{address}/api/v1/query", params={"query": query})
    except httpx.TransportError:
        return []
    if answer.status_code == 503:
        return []
    assert answer.json()["status"] == "success", answer.text
    return list(answer.json()["data"]["result"])


def query_status(address: str, query: str) -> str:
    return str(httpx.get(f"http://{address}/api/v1/query", params={"query": query}).json()["status"])


def until(condition: Any, seconds: float = 60.0) -> Any:
    """What the condition gives as soon as it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found
