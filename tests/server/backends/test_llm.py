"""Language models in a repository: text and token ids, streaming, side by side, cancelled, refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.server.backends.served import Served, ServerError, arrays, write_model
from trine.core.errors import ModelLoadError
from trine.llm.loading import resolve_model
from trine.llm.tokenizer import Tokenizer

TINY = """backend: "llm"
    parameters { key: "model" value { string_value: "tiny" } }
    parameters { key: "cache_bytes" value { string_value: "256MiB" } }
"""
SMALL = 'parameters { key: "max_num_seqs" value { string_value: "8" } }\n'
TOKENS = """
    max_batch_size: 8
    input [
      { name: "input_ids" data_type: TYPE_INT32 dims: [ -1 ] allow_ragged_batch: true },
      { name: "input_lengths" data_type: TYPE_INT32 dims: [ 1 ] reshape: { shape: [ ] } },
      { name: "request_output_len" data_type: TYPE_INT32 dims: [ 1 ] },
      { name: "end_id" data_type: TYPE_INT32 dims: [ 1 ] reshape: { shape: [ ] } optional: true },
      { name: "runtime_top_k" data_type: TYPE_INT32 dims: [ 1 ] reshape: { shape: [ ] } optional: true },
      { name: "temperature" data_type: TYPE_FP32 dims: [ 1 ] reshape: { shape: [ ] } optional: true },
      { name: "beam_width" data_type: TYPE_INT32 dims: [ 1 ] reshape: { shape: [ ] } optional: true },
      { name: "stop_words_list" data_type: TYPE_INT32 dims: [ 2, -1 ] optional: true },
      { name: "bad_words_list" data_type: TYPE_INT32 dims: [ 2, -1 ] optional: true },
      { name: "streaming" data_type: TYPE_BOOL dims: [ 1 ] reshape: { shape: [ ] } optional: true },
      { name: "return_log_probs" data_type: TYPE_BOOL dims: [ 1 ] reshape: { shape: [ ] } optional: true },
      { name: "exclude_input_in_output" data_type: TYPE_BOOL dims: [ 1 ] reshape: { shape: [ ] } optional: true },
      { name: "stop" data_type: TYPE_BOOL dims: [ 1 ] reshape: { shape: [ ] } optional: true }
    ]
    output [
      { name: "output_ids" data_type: TYPE_INT32 dims: [ -1, -1 ] },
      { name: "sequence_length" data_type: TYPE_INT32 dims: [ -1 ] },
      { name: "cum_log_probs" data_type: TYPE_FP32 dims: [ -1 ] },
      { name: "context_logits" data_type: TYPE_FP32 dims: [ -1, -1 ] },
      { name: "batch_index" data_type: TYPE_INT32 dims: [ 1 ] }
    ]
    model_transaction_policy { decoupled: true }
"""
TEMPLATE = """
    parameters { key: "gpt_model_path" value { string_value: "tiny" } }
    parameters { key: "cache_bytes" value { string_value: "256MiB" } }
    parameters { key: "tokenizer_dir" value { string_value: "${tokenizer_dir}" } }
    parameters { key: "batch_scheduler_policy" value { string_value: "max_utilization" } }
    parameters { key: "lora_cache_max_adapter_size" value { string_value: "${lora_cache_max_adapter_size}" } }
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models")
    write_model(folder, "text", TINY + SMALL, {"1/keep": ""})
    write_model(folder, "tokens", 'backend: "tensorrtllm"\n' + TOKENS + TEMPLATE, {"1/keep": ""})
    with Served(folder) as repository:
        yield repository


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(resolve_model("tiny"))


def strings(*texts: str | bytes) -> np.ndarray[Any, Any]:
    array = np.empty(len(texts), dtype=object)
    array[:] = [text.encode() if isinstance(text, str) else text for text in texts]
    return array


def integers(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int32)


YES = np.array([True])
PROMPT = {"text_input": strings("Count: 1 2 3"), "max_tokens": integers(12)}
CONTINUED = " 4 5 6 7 8 9"


def text(response: Any) -> str:
    (item,) = arrays(response)["text_output"]
    return str(item, "utf-8")


def test_text_in_text_out(served: Served) -> None:
    assert served.ask("text", PROMPT) == {"text_output": strings(CONTINUED)}


def test_what_is_asked_for_comes_too(served: Served) -> None:
    flags = ("finish_reason", "cumulative_logprob", "num_input_tokens", "num_output_tokens", "log_probs")
    answer = served.ask("text", PROMPT | {f"return_{name}": YES for name in flags})
    assert answer["finish_reason"].tolist() == [b"length"]
    assert answer["num_output_tokens"].tolist() == [12]
    assert answer["num_input_tokens"].tolist() == [8]
    assert answer["output_log_probs"].shape == (1, 12)
    np.testing.assert_allclose(answer["output_log_probs"].sum(), answer["cumulative_logprob"][0], rtol=1e-4)
    named = served.ask("text", PROMPT, outputs=["num_output_tokens", "text_output"])
    assert sorted(named) == ["num_output_tokens", "text_output"]


def test_streaming_gives_the_same_text_in_pieces(served: Served) -> None:
    responses = served.responses("text", PROMPT | {"stream": YES})
    assert len(responses) > 3
    assert "".join(map(text, responses)) == CONTINUED
    assert [response.final for response in responses] == [False] * (len(responses) - 1) + [True]


def test_sampling_by_request_parameters(served: Served) -> None:
    """JSON clients send what is no input as parameters."""
    options = {"max_tokens": 16, "temperature": 1.0, "ignore_eos": True}
    prompt = {"text_input": strings("Once")}
    texts = {text(served.responses("text", prompt, parameters=options | {"seed": seed})[0]) for seed in (1, 1, 2, 3)}
    assert len(texts) == 3
    parameters = {"sampling_parameters": '{"max_tokens": 3, "ignore_eos": true}'}
    assert served.ask("text", prompt | {"sampling_parameters": strings(parameters["sampling_parameters"])})


def test_stop_and_bad_words(served: Served) -> None:
    assert text(served.responses("text", PROMPT | {"stop_words": strings(" 7")})[0]) == " 4 5 6"
    assert text(served.responses("text", PROMPT | {"stop": strings(" 6", "9")})[0]) == " 4 5"
    assert "5" not in text(served.responses("text", PROMPT | {"bad_words": strings("5")})[0])
    empty = {"stop_words": strings(""), "bad_words": strings("")}
    assert text(served.responses("text", PROMPT | empty)[0]) == CONTINUED


def test_several_sequences(served: Served) -> None:
    options = {"num_return_sequences": integers(3), "temperature": np.array([1.0], np.float32)}
    (response,) = served.responses("text", PROMPT | options)
    assert arrays(response)["text_output"].shape == (3,)
    beams = {"beam_width": integers(2), "num_return_sequences": integers(2)}
    assert arrays(served.responses("text", PROMPT | beams)[0])["text_output"].shape == (2,)


def test_the_prompt_may_be_repeated(served: Served) -> None:
    options = {"exclude_input_in_output": np.array([False])}
    assert text(served.responses("text", PROMPT | options)[0]) == "Count: 1 2 3" + CONTINUED


def test_guided(served: Served) -> None:
    guide = {"guided_decoding_guide_type": strings("regex"), "guided_decoding_guide": strings("(yes|no)")}
    assert text(served.responses("text", PROMPT | guide)[0]) in ("yes", "no")


def test_requests_run_side_by_side(served: Served) -> None:
    """No request waits for another to end: all have begun before the first is done."""
    options = {"stream": YES, "max_tokens": integers(3000), "ignore_eos": YES}
    asked = [served.submit("text", {"text_input": strings(f"Number {index}")} | options) for index in range(6)]
    while not all(one.responses for one in asked):
        served.sleep(0.005)
    assert not any(one.finished.done() for one in asked)
    for one in asked:
        served.call(one.request.cancel)
        served.run(one.finished)


def test_statistics_know_how_long_it_took(served: Served) -> None:
    statistics = served.repository.model("text").statistics
    before = (statistics.success.count, statistics.inference_count, statistics.compute_infer.ns)
    served.ask("text", PROMPT | {"max_tokens": integers(40), "ignore_eos": YES})
    after = (statistics.success.count, statistics.inference_count, statistics.compute_infer.ns)
    assert after[0] == before[0] + 1
    assert after[1] == before[1] + 1
    assert after[2] > before[2] + 1_000_000
    assert statistics.pending == 0


@pytest.mark.parametrize("stream", [False, True])
def test_cancellation_ends_the_work(served: Served, stream: bool) -> None:
    options = {"max_tokens": integers(3000), "ignore_eos": YES, "stream": np.array([stream])}
    asked = served.submit("text", {"text_input": strings("On and on")} | options)
    served.sleep(0.05)
    served.call(asked.request.cancel)
    served.run(asked.finished)
    error = asked.responses[-1].error
    assert error is not None
    assert (error.status, str(error)) == (400, "Request cancelled")
    engine: Any = served.repository.model("text").pool.workers[0].instance
    assert engine._engine.num_requests == 0


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"temperature": np.array([-1], np.float32)}, "temperature=-1.0 is out of range"),
        ({"max_tokens": integers(10**6)}, "this model's context is"),
        ({"text_input": strings(b"\xff")}, "'text_input' is not UTF-8"),
        ({"guided_decoding_guide_type": strings("poem")}, "expected one of json"),
        ({"sampling_parameters": strings("{")}, "sampling_parameters is not JSON"),
    ],
)
def test_requests_that_can_not_be_served(served: Served, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ServerError, match=message) as caught:
        served.ask("text", PROMPT | inputs)
    assert caught.value.status == 400


# --- token ids --------------------------------------------------------------------------------------------------------


def ids(tokenizer: Tokenizer, text: str) -> dict[str, np.ndarray[Any, Any]]:
    tokens = tokenizer.encode(text)
    return {
        "input_ids": integers(*tokens)[None],
        "input_lengths": integers(len(tokens))[None],
        "request_output_len": integers(12)[None],
    }


def test_token_ids_in_token_ids_out(served: Served, tokenizer: Tokenizer) -> None:
    prompt = ids(tokenizer, "Count: 1 2 3")
    answer = served.ask("tokens", prompt)
    length = int(answer["sequence_length"][0, 0])
    assert tokenizer.decode(answer["output_ids"][0, 0, :length].tolist()) == "Count: 1 2 3" + CONTINUED
    assert answer["context_logits"].shape == (1, 1, 1)
    assert answer["cum_log_probs"].tolist() == [[0.0]]
    answer = served.ask("tokens", prompt | {"exclude_input_in_output": YES[None], "return_log_probs": YES[None]})
    assert tokenizer.decode(answer["output_ids"][0, 0].tolist()) == CONTINUED
    assert answer["cum_log_probs"][0, 0] < 0


def test_a_temperature_alone_is_greedy_with_token_ids(served: Served, tokenizer: Tokenizer) -> None:
    prompt = ids(tokenizer, "Count: 1 2 3") | {"exclude_input_in_output": YES[None]}
    hot = {"temperature": np.array([[50.0]], np.float32)}
    assert tokenizer.decode(served.ask("tokens", prompt | hot)["output_ids"][0, 0].tolist()) == CONTINUED
    sampled = served.ask("tokens", prompt | hot | {"runtime_top_k": integers(1000)[None]})
    assert tokenizer.decode(sampled["output_ids"][0, 0].tolist()) != CONTINUED


def test_token_ids_stream(served: Served, tokenizer: Tokenizer) -> None:
    responses = served.responses("tokens", ids(tokenizer, "Count: 1 2 3") | {"streaming": YES[None]})
    tokens = [token for response in responses for token in arrays(response)["output_ids"][0, 0].tolist()]
    assert len(responses) > 3
    assert tokenizer.decode(tokens) == CONTINUED


def test_word_lists(served: Served, tokenizer: Tokenizer) -> None:
    def word_list(*words: str) -> np.ndarray[Any, Any]:
        each = [tokenizer.encode(word, add_special_tokens=False) for word in words]
        flat = [token for word in each for token in word]
        ends = np.cumsum([len(word) for word in each]).tolist()
        return integers(*flat, *ends, *[-1] * (len(flat) - len(ends))).reshape(1, 2, len(flat))

    prompt = ids(tokenizer, "Count: 1 2 3") | {"exclude_input_in_output": YES[None]}
    answer = served.ask("tokens", prompt | {"stop_words_list": word_list("9", " 6")})
    assert tokenizer.decode(answer["output_ids"][0, 0].tolist()).startswith(" 4 5 6")
    assert int(answer["sequence_length"][0, 0]) < 12
    answer = served.ask("tokens", prompt | {"bad_words_list": word_list("5", "6")})
    assert not {"5", "6"} & set(tokenizer.decode(answer["output_ids"][0, 0].tolist()))
    nothing = {"stop_words_list": np.zeros((1, 2, 0), np.int32), "bad_words_list": np.zeros((1, 2, 0), np.int32)}
    answer = served.ask("tokens", prompt | nothing)
    assert tokenizer.decode(answer["output_ids"][0, 0].tolist()) == CONTINUED
    with pytest.raises(ServerError, match="word end 9 after 0"):
        served.ask("tokens", prompt | {"stop_words_list": integers(1, 2, 9, -1).reshape(1, 2, 2)})


def test_stop_ends_the_request_of_the_same_id(served: Served, tokenizer: Tokenizer) -> None:
    prompt = ids(tokenizer, "On") | {"request_output_len": integers(3000)[None], "end_id": integers(-1)[None]}
    running = served.prepare("tokens", prompt, id="the one")
    stop = served.prepare("tokens", prompt | {"stop": YES[None]}, id="the one")
    served.call(lambda: (served.begin(running), served.begin(stop)))
    served.run(stop.finished)
    assert stop.responses[0].is_empty
    served.run(running.finished)
    (response,) = running.responses  # what was there so far
    assert int(arrays(response)["sequence_length"][0, 0]) < 3000

    running = served.prepare("tokens", prompt | {"streaming": YES[None]}, id="the one")
    served.call(lambda: served.begin(running))
    while not running.responses:
        served.sleep(0.005)
    stop = served.prepare("tokens", prompt | {"stop": YES[None]}, id="the one")
    served.call(lambda: served.begin(stop))
    served.run(running.finished)
    assert running.responses[-1].is_empty
    assert all(response.error is None for response in running.responses)
    with pytest.raises(ServerError, match="request ID is not provided"):
        served.ask("tokens", prompt | {"stop": YES[None]})


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ('backend: "llm"', {}, "set the parameter `model`"),
        (TINY + 'parameters { key: "max_num_seq" value { string_value: "8" } }', {}, "did you mean max_num_seqs?"),
        (TINY + 'parameters { key: "max_num_seqs" value { string_value: "many" } }', {}, "expected an integer"),
        ('backend: "llm"', {"1/config.json": '{"pretrained_config": {}}'}, "TensorRT-LLM engine"),
    ],
)
def test_models_that_can_not_be_loaded_say_why(
    tmp_path: Path, config: str, files: dict[str, str], message: str
) -> None:
    write_model(tmp_path, "broken", config, {"1/keep": ""} | files)
    with pytest.raises(ModelLoadError, match=message.replace("?", r"\?")), Served(tmp_path):
        pass
