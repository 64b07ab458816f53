"""One server for everything: a language model, TorchScript, Python and an ensemble, by every protocol, on one port."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client

from tests.server.backends.served import write_model
from tests.service.process import Process
from trine.llm.loading import resolve_model

PIPELINE = Path(__file__).parent / "pipeline"
TOKENIZER = 'parameters {{ key: "tokenizer_dir" value {{ string_value: "{directory}" }} }}'
ENGINE = """
    backend: "tensorrtllm" max_batch_size: 4
    model_transaction_policy { decoupled: true }
    input [
      { name: "input_ids" data_type: TYPE_INT32 dims: [ -1 ] allow_ragged_batch: true },
      { name: "input_lengths" data_type: TYPE_INT32 dims: [ 1 ] reshape: { shape: [ ] } },
      { name: "request_output_len" data_type: TYPE_INT32 dims: [ 1 ] reshape: { shape: [ ] } },
      { name: "bad_words_list" data_type: TYPE_INT32 dims: [ 2, -1 ] optional: true allow_ragged_batch: true },
      { name: "stop_words_list" data_type: TYPE_INT32 dims: [ 2, -1 ] optional: true allow_ragged_batch: true },
      { name: "streaming" data_type: TYPE_BOOL dims: [ 1 ] reshape: { shape: [ ] } optional: true }
    ]
    output [
      { name: "output_ids" data_type: TYPE_INT32 dims: [ -1, -1 ] },
      { name: "sequence_length" data_type: TYPE_INT32 dims: [ -1 ] },
      { name: "cum_log_probs" data_type: TYPE_FP32 dims: [ -1 ] }
    ]
    parameters { key: "gpt_model_path" value { string_value: "tiny" } }
    parameters { key: "cache_bytes" value { string_value: "256MiB" } }
    parameters { key: "max_tokens_in_paged_kv_cache" value { string_value: "${max_tokens_in_paged_kv_cache}" } }
"""
TOKENIZE = """
    backend: "python" max_batch_size: 4
    input [
      { name: "QUERY" data_type: TYPE_STRING dims: [ 1 ] },
      { name: "REQUEST_OUTPUT_LEN" data_type: TYPE_INT32 dims: [ 1 ] },
      { name: "BAD_WORDS_DICT" data_type: TYPE_STRING dims: [ -1 ] optional: true },
      { name: "STOP_WORDS_DICT" data_type: TYPE_STRING dims: [ -1 ] optional: true }
    ]
    output [
      { name: "INPUT_ID" data_type: TYPE_INT32 dims: [ -1 ] },
      { name: "REQUEST_INPUT_LEN" data_type: TYPE_INT32 dims: [ 1 ] },
      { name: "BAD_WORDS_IDS" data_type: TYPE_INT32 dims: [ 2, -1 ] },
      { name: "STOP_WORDS_IDS" data_type: TYPE_INT32 dims: [ 2, -1 ] },
      { name: "REQUEST_OUTPUT_LEN" data_type: TYPE_INT32 dims: [ -1 ] }
    ]
"""
DETOKENIZE = """
    backend: "python" max_batch_size: 4
    input [
      { name: "TOKENS_BATCH" data_type: TYPE_INT32 dims: [ -1, -1 ] },
      { name: "SEQUENCE_LENGTH" data_type: TYPE_INT32 dims: [ -1 ] }
    ]
    output { name: "OUTPUT" data_type: TYPE_STRING dims: [ -1 ] }
"""
ENSEMBLE = """
    platform: "ensemble" max_batch_size: 4
    input [
      { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] },
      { name: "max_tokens" data_type: TYPE_INT32 dims: [ 1 ] },
      { name: "bad_words" data_type: TYPE_STRING dims: [ -1 ] optional: true },
      { name: "stop_words" data_type: TYPE_STRING dims: [ -1 ] optional: true },
      { name: "stream" data_type: TYPE_BOOL dims: [ 1 ] optional: true }
    ]
    output [
      { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] },
      { name: "cum_log_probs" data_type: TYPE_FP32 dims: [ -1 ] },
      { name: "cum_log_probs" data_type: TYPE_FP32 dims: [ -1 ] }
    ]
    ensemble_scheduling { step [
      {
        model_name: "preprocessing" model_version: -1
        input_map { key: "QUERY" value: "text_input" }
        input_map { key: "REQUEST_OUTPUT_LEN" value: "max_tokens" }
        input_map { key: "BAD_WORDS_DICT" value: "bad_words" }
        input_map { key: "STOP_WORDS_DICT" value: "stop_words" }
        output_map { key: "INPUT_ID" value: "_INPUT_ID" }
        output_map { key: "REQUEST_INPUT_LEN" value: "_INPUT_LEN" }
        output_map { key: "BAD_WORDS_IDS" value: "_BAD" }
        output_map { key: "STOP_WORDS_IDS" value: "_STOP" }
        output_map { key: "REQUEST_OUTPUT_LEN" value: "_OUTPUT_LEN" }
      },
      {
        model_name: "tensorrt_llm" model_version: -1
        input_map { key: "input_ids" value: "_INPUT_ID" }
        input_map { key: "input_lengths" value: "_INPUT_LEN" }
        input_map { key: "request_output_len" value: "_OUTPUT_LEN" }
        input_map { key: "bad_words_list" value: "_BAD" }
        input_map { key: "stop_words_list" value: "_STOP" }
        input_map { key: "streaming" value: "stream" }
        output_map { key: "output_ids" value: "_TOKENS" }
        output_map { key: "sequence_length" value: "_LENGTH" }
        output_map { key: "cum_log_probs" value: "cum_log_probs" }
      },
      {
        model_name: "postprocessing" model_version: -1
        input_map { key: "TOKENS_BATCH" value: "_TOKENS" }
        input_map { key: "SEQUENCE_LENGTH" value: "_LENGTH" }
        output_map { key: "OUTPUT" value: "text_output" }
      }
    ] }
"""

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


class Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def write_repository(folder: Path) -> None:
    parameters = TOKENIZER.format(directory=resolve_model("tiny"))
    for name, source, config in (
        ("preprocessing", "tokenize", TOKENIZE),
        ("postprocessing", "detokenize", DETOKENIZE),
    ):
        files = {"1/model.py": (PIPELINE / f"{source}.py").read_text()}
        write_model(folder, name, config + parameters, files)
    write_model(folder, "tensorrt_llm", ENGINE, {"1/keep": ""})
    write_model(folder, "ensemble", ENSEMBLE, {"1/keep": ""})
    four = "data_type: TYPE_FP32 dims: [ 4 ]"
    config = f'backend: "pytorch" input {{ name: "x" {four} }} output {{ name: "y" {four} }}'
    place = write_model(folder, "double", config, {"1/keep": ""})
    torch.jit.trace(Double(), torch.zeros(4)).save(place / "1" / "model.pt")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("models")
    write_repository(folder)
    process = Process("--model-repository", str(folder), "--api-key", "secret")
    yield process
    assert process.stop() == 0


KEY = {"Authorization": "Bearer secret"}
CURL = {"text_input": "Count: 1 2 3", "max_tokens": 12, "bad_words": "", "stop_words": ""}


def post(server: Process, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
    return httpx.post(f"http://{server.http}{path}", content=json.dumps(body), **({"headers": KEY} | options))


def test_the_ensemble_answers_curl(server: Process) -> None:
    answer = post(server, "/v2/models/ensemble/generate", CURL).json()
    assert answer == {
        "model_name": "ensemble",
        "model_version": "1",
        "sequence_id": 0,
        "sequence_start": False,
        "sequence_end": False,
        "text_output": "Count: 1 2 3 4 5 6 7 8 9",
        "cum_log_probs": 0.0,
    }


def test_stop_words_reach_the_engine(server: Process) -> None:
    answer = post(server, "/v2/models/ensemble/generate", CURL | {"stop_words": "7"}).json()
    assert answer["text_output"].startswith("Count: 1 2 3 4 5 6")
    assert "8" not in answer["text_output"]


def test_bad_words_reach_the_engine(server: Process) -> None:
    answer = post(server, "/v2/models/ensemble/generate", CURL | {"bad_words": "5"}).json()
    assert "5" not in answer["text_output"]


def test_the_ensemble_streams(server: Process) -> None:
    text = post(server, "/v2/models/ensemble/generate_stream", CURL | {"stream": True}).text
    pieces = [json.loads(line.removeprefix("data: "))["text_output"] for line in text.splitlines() if line]
    assert len(pieces) > 3
    assert "".join(pieces) == " 4 5 6 7 8 9"


def test_the_engine_answers_openai(server: Process) -> None:
    client = openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="secret", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tensorrt_llm"]
    answer = client.completions.create(model="tensorrt_llm", prompt="Count: 1 2 3", max_tokens=12, temperature=0)
    assert answer.choices[0].text == " 4 5 6 7 8 9"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="double", prompt="x")


def test_a_classic_model_by_tritons_clients(server: Process) -> None:
    values = np.arange(4, dtype=np.float32)
    for module, address, headers in (
        (http_client, server.http, dict(KEY)),  # the client adds to it
        (grpc_client, server.grpc, {"authorization": "Bearer secret"}),
    ):
        tensor = module.InferInput("x", [4], "FP32")
        tensor.set_data_from_numpy(values)
        with module.InferenceServerClient(address) as client:
            answer = client.infer("double", [tensor], headers=headers)
        np.testing.assert_array_equal(answer.as_numpy("y"), values * 2)


def test_one_key_opens_every_protocol(server: Process) -> None:
    assert httpx.get(f"http://{server.http}/v2/health/ready").status_code == 200
    for path in ("/v2/models/double", "/v1/models"):
        assert httpx.get(f"http://{server.http}{path}").status_code == 401
        assert httpx.get(f"http://{server.http}{path}", headers=KEY).status_code == 200
        assert httpx.get(f"http://{server.http}{path}", headers={"Authorization": "Bearer no"}).status_code == 401
    with grpc_client.InferenceServerClient(server.grpc) as client, pytest.raises(Exception, match="API key"):
        client.get_model_metadata("double")


def test_every_models_metrics_are_on_one_page(server: Process) -> None:
    text = httpx.get(f"http://{server.metrics}/metrics").text
    for name in ("ensemble", "preprocessing", "tensorrt_llm", "postprocessing", "double"):
        assert f'nv_inference_request_success{{model="{name}",version="1"}}' in text
