"""What surrounds the models: lists, health, tokens, metrics, documentation, headers."""

from __future__ import annotations

import concurrent.futures
import re
import shlex
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest

from tests.conformance.harness import MODEL, Api, Server


def get(server: Server, path: str, **options: Any) -> httpx.Response:
    return httpx.get(server.url + path, timeout=30, **options)


def post(server: Server, path: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=60, **options)


def metric(server: Server, name: str, labels: str = "") -> float:
    """The sum of a metric's series whose labels hold `labels`."""
    lines = get(server, "/metrics").text.splitlines()
    values = [line.rpartition(" ")[2] for line in lines if re.match(rf"trine_{name}(\{{|\s)", line) and labels in line]
    return sum(map(float, values))


def test_models(api: Api) -> None:
    models = api.call(lambda client: client.models.list()).data
    assert MODEL in [model.id for model in models]
    model = api.call(lambda client: client.models.retrieve(MODEL))
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "trine")
    assert model.max_model_len == 4096


@pytest.mark.parametrize("path", ["/health", "/v1/health/live", "/v1/health/ready"])
def test_health(server: Server, path: str) -> None:
    answer = get(server, path)
    assert answer.status_code == 200
    assert answer.json()["object"] == "health.response"
    assert httpx.head(server.url + path).status_code == 200


@pytest.mark.parametrize("path", ["/version", "/v1/version", "/v1/metadata", "/v1/license", "/v1/manifest"])
def test_descriptions(server: Server, path: str) -> None:
    answer = get(server, path)
    assert answer.status_code == 200
    assert answer.json()


def test_tokenize_and_back(server: Server) -> None:
    text = "Hello, world! ☃"
    made = post(server, "/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"])
    assert post(server, "/detokenize", {"tokens": made["tokens"]}).json() == {"prompt": text}
    chat = post(server, "/tokenize", {"messages": [{"role": "user", "content": text}]}).json()
    assert chat["count"] > made["count"]
    assert post(server, "/tokenize", {}).status_code == 400
    assert post(server, "/detokenize", {"tokens": [10**9]}).status_code == 400


def test_chat_usage_counts_what_tokenize_counts(api: Api, server: Server) -> None:
    messages = [{"role": "user", "content": "What is 1 + 1?"}]
    counted = post(server, "/tokenize", {"messages": messages}).json()["count"]
    assert api.chat(None, messages=messages).usage.prompt_tokens == counted


def test_metrics_count(api: Api, server: Server) -> None:
    def read() -> dict[str, float]:
        names = ("prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count")
        names += ("e2e_request_latency_seconds_count", "request_generation_tokens_count")
        return {name: metric(server, name, f'model_name="{MODEL}"') for name in names}

    before = read()
    usage = api.chat("Tell me a story.").usage
    api.chat_events("Tell me a story.")
    after = read()
    assert after["prompt_tokens_total"] - before["prompt_tokens_total"] == 2 * usage.prompt_tokens
    assert after["generation_tokens_total"] - before["generation_tokens_total"] == 2 * usage.completion_tokens
    for name in ("time_to_first_token_seconds_count", "e2e_request_latency_seconds_count"):
        assert after[name] - before[name] == 2
    assert metric(server, "request_finish_total", 'finished_reason="length"') >= 2
    assert metric(server, "num_request_max") > 0


def test_every_metric_of_nim_is_there(server: Server) -> None:
    text = get(server, "/v1/metrics").text
    for name in (
        "gpu_cache_usage_perc",
        "num_requests_running",
        "num_requests_waiting",
        "num_request_max",
        "prompt_tokens_total",
        "generation_tokens_total",
        "time_to_first_token_seconds_bucket",
        "time_per_output_token_seconds_bucket",
        "e2e_request_latency_seconds_bucket",
        "request_prompt_tokens_bucket",
        "request_generation_tokens_bucket",
        "request_finish_total",
        "num_preemptions_total",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
    ):
        assert re.search(rf"^{name}\{{.*model_name=\"{MODEL}\"", text, re.MULTILINE), name
        assert f"trine_{name}{{" in get(server, "/metrics").text


def test_errors_are_counted(server: Server) -> None:
    labels = 'endpoint="/v1/chat/completions",model_name="tiny",status="400"'
    before = metric(server, "http_requests_total", labels)
    post(server, "/v1/chat/completions", {"model": MODEL})
    assert metric(server, "http_requests_total", labels) == before + 1


def test_openapi_and_docs(server: Server) -> None:
    document = get(server, "/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    operation = document["paths"]["/v1/chat/completions"]["post"]
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema = document["components"]["schemas"][reference.rpartition("/")[2]]
    assert {"messages", "temperature", "tools", "guided_json"} <= set(schema["properties"])
    assert set(schema["required"]) == {"messages", "model"}
    for path in ("/docs", "/"):
        page = get(server, path)
        assert page.headers["content-type"].startswith("text/html")
        assert not re.search(r"""(src|href)=["']?https?://""", page.text)


def test_request_ids(server: Server) -> None:
    assert get(server, "/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert re.fullmatch(r"[0-9a-f]{32}", get(server, "/health").headers["x-request-id"])
    assert get(server, "/health", headers={"x-request-id": "two words"}).headers["x-request-id"] != "two words"


def test_cross_origin(server: Server) -> None:
    headers = {"origin": "https://example.org", "access-control-request-method": "POST"}
    preflight = httpx.options(f"{server.url}/v1/chat/completions", headers=headers)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == "https://example.org"
    assert "POST" in preflight.headers["access-control-allow-methods"]
    other = get(server, "/health", headers={"origin": "https://elsewhere.org"})
    assert "access-control-allow-origin" not in other.headers


def test_idempotency_keys(server: Server) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 8}
    body |= {"temperature": 1.5}
    headers = {"idempotency-key": f"key-{time.time_ns()}"}
    with concurrent.futures.ThreadPoolExecutor() as threads:
        answers = list(threads.map(lambda _: post(server, "/v1/chat/completions", body, headers=headers), range(3)))
    assert len({answer.content for answer in answers}) == 1
    assert sorted(answer.headers.get("idempotent-replayed", "") for answer in answers) == ["", "true", "true"]
    reused = post(server, "/v1/chat/completions", body | {"max_tokens": 9}, headers=headers)
    assert (reused.status_code, reused.json()["error"]["code"]) == (409, "idempotency_key_reused")
    headers = {"idempotency-key": f"stream-{time.time_ns()}"}
    first, second = (post(server, "/v1/chat/completions", body | {"stream": True}, headers=headers) for _ in range(2))
    assert first.text == second.text
    assert second.text.endswith("data: [DONE]\n\n")


def test_thirty_two_at_once(api: Api) -> None:
    """As many clients as the acceptance test has, each with its own answer."""
    sums = [(a, a + 7) for a in range(10, 42)]
    alone = [api.chat(f"What is {a} + {b}?").choices[0].message.content for a, b in sums[:4]]
    with concurrent.futures.ThreadPoolExecutor(32) as threads:
        clients = [Api("sync", str(api.client.base_url).removesuffix("/v1/")) for _ in sums]
        asked = zip(clients, sums, strict=True)
        answers = list(threads.map(lambda pair: pair[0].chat("What is {} + {}?".format(*pair[1])), asked))
        for client in clients:
            client.close()
    assert [answer.choices[0].message.content for answer in answers[:4]] == alone


def test_a_client_that_hangs_up_stops_its_work(server: Server) -> None:
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    before = metric(server, "request_finish_total", 'finished_reason="abort"')
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as answer:
        next(answer.iter_bytes())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body | {"stream": False}, timeout=0.3)
    deadline = time.monotonic() + 10
    while metric(server, "request_finish_total", 'finished_reason="abort"') < before + 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while metric(server, "num_requests_running") or metric(server, "gpu_cache_usage_perc"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_banner_can_be_copied(server: Server) -> None:
    printed = "".join(server.output)
    curl = next(line for line in server.output if line.startswith("curl "))
    answer = subprocess.run([*shlex.split(curl), "-sS", "--fail"], capture_output=True, text=True, check=True)
    assert '"choices"' in answer.stdout
    snippet = printed[printed.index("from openai import OpenAI") :]
    snippet = snippet[: snippet.index("print(") + snippet[snippet.index("print(") :].index("\n")]
    result = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, check=True)
    assert result.stdout.strip()
