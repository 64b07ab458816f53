"""The embedded model's files, and the scripts that make it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from models.tiny.chat import Conversations, render
from models.tiny.data import CATEGORIES, Documents, Rows
from trine.evaluation import make_items, split_of
from trine.llm.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = ROOT / "trine" / "data" / "tiny"
DEFINITIONS = {"otter": "a small animal that swims", "river": "a large stream of water"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(DIRECTORY)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A stand-in for the prose."""
    directory = tmp_path_factory.mktemp("data")
    np.save(directory / "prose.npy", np.array(tokenizer.encode("The river runs by the old mill. " * 500), np.uint16))
    (directory / "definitions.json").write_text(json.dumps(DEFINITIONS), encoding="utf-8")
    return directory


def test_the_package_data_is_small_and_holds_what_the_configuration_says() -> None:
    assert sum(file.stat().st_size for file in DIRECTORY.iterdir()) <= 20_000_000
    config = json.loads((DIRECTORY / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["max_position_embeddings"] == 4096
    with safe_open(DIRECTORY / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert len([name for name in names if name.endswith("q_proj.weight")]) == config["num_hidden_layers"]
        assert weights.get_slice("model.embed_tokens.weight").get_shape() == [4096, config["hidden_size"]]
        assert "lm_head.weight" not in names


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "a  b\t c\n\n  d \r\n",
        "1234 + 5.60",
        "naïve Köln 東京 🎉👩‍👩‍👧",
        '{"a": [1, true]}',
        " x",
        "\x00\x7f",
    ],
)
def test_the_tokenizer_gives_back_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_digits_are_single_tokens_and_marks_are_one_token(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("90210", add_special_tokens=False)) == 5
    for mark in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>"):
        assert len(tokenizer.encode(mark, add_special_tokens=False)) == 1
    assert tokenizer.decode(tokenizer.encode("<tool_call>x</tool_call><|im_end|>")) == "<tool_call>x</tool_call>"
    assert {tokenizer.token_text(token) for token in tokenizer.eos_token_ids} == {"<|im_end|>", "<|endoftext|>"}


def test_training_renders_chats_as_the_template_does(tokenizer: Tokenizer) -> None:
    def check(messages: list[dict], tools: list[dict]) -> None:
        text = "".join(part for part, _ in render(messages, tools))
        assert text == tokenizer.render_chat(messages, tools=tools or None, add_generation_prompt=False)

    for task in ("addition", "extraction", "tool_calling", "lookup"):
        for item in make_items(task, 0, 20, "train", lambda texts: [len(text) // 3 for text in texts]):
            check([*item.messages, {"role": "assistant", "content": item.answer}], list(item.tools))
    tool = {"type": "function", "function": {"name": "f", "description": "é <&> '", "parameters": {}}}
    user, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    result = {"role": "tool", "content": "1"}
    check([user, answer, result, result, answer, user, answer], [tool, tool])
    check([{"role": "system", "content": "s"}, user, answer], [tool])


def test_the_template_renders_the_forms_of_the_openai_api(tokenizer: Tokenizer) -> None:
    function = {"name": "f", "arguments": '{"a": 1}'}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    parsed = {**call, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}
    text = tokenizer.render_chat([parts, call])
    assert text == tokenizer.render_chat([parts, parsed])
    assert text == (
        "<|im_start|>user\none two<|im_end|>\n<|im_start|>assistant\n<tool_call>\n"
        '{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n<|im_start|>assistant\n'
    )
    twice = tokenizer.render_chat([parts, {**call, "tool_calls": call["tool_calls"] * 2}])
    assert twice.count("</tool_call>\n<tool_call>") == 1


def test_rows_are_full_and_only_answers_count(data: Path, tokenizer: Tokenizer) -> None:
    documents = Documents(data, tokenizer.hf)
    row = Rows(documents, 1024, random.Random(0)).make(1.0)
    assert row.shape == (4, 1024)
    starts = np.flatnonzero(np.diff(row[2])) + 1
    assert list(np.unique(np.diff(row[2]))) == [0, 1]
    for piece in np.split(row, starts, axis=1)[:-1]:
        category, text = CATEGORIES[piece[3, 0]], tokenizer.decode(piece[0].tolist(), skip_special_tokens=False)
        if category not in ("prose", "drill"):
            answers = text.split("<|im_start|>assistant\n")[1:]
            counted = tokenizer.decode(piece[0, piece[1] > 0].tolist(), skip_special_tokens=False)
            assert counted == "".join(answer.partition("<|im_end|>")[0] + "<|im_end|>" for answer in answers)


def test_training_documents_hold_no_heldout_item(data: Path, tokenizer: Tokenizer) -> None:
    documents = Documents(data, tokenizer.hf)
    rng = random.Random(0)
    for _ in range(200):
        for sum_, _ in documents.drill(rng)[::2]:
            sign = "+" if "+" in sum_ else "-"
            low, high = sorted(map(int, sum_.removesuffix("=").split(sign)))
            task, content = ("addition", f"{low}+{high}") if sign == "+" else ("subtraction", f"{high}-{low}")
            assert split_of(task, content) == "train"


def test_conversations_are_drawn_from_the_seed() -> None:
    first, again = (
        [Conversations(DEFINITIONS).draw(rng) for _ in range(100)] for rng in (random.Random(1), random.Random(1))
    )
    assert first == again


def test_the_training_script_writes_a_checkpoint_and_goes_on_from_its_state(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "models.tiny.train", "--data", str(data), "--model", str(DIRECTORY)]
    command += ["--output", str(tmp_path), "--rows", "1", "--length", "96", "--workers", "0", "--steps", "4"]
    command += ["--stop-after", "1"]
    state = str(tmp_path / "state.pt")
    subprocess.run([*command, "--save", state], cwd=ROOT, check=True, capture_output=True)
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        before = weights.get_tensor("model.layers.0.mlp.up_proj.weight")
    subprocess.run([*command, "--resume", state], cwd=ROOT, check=True, capture_output=True)
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        assert (weights.get_tensor("model.layers.0.mlp.up_proj.weight") - before).abs().max() > 0
        assert weights.get_slice("model.layers.7.self_attn.q_proj.weight").get_dtype() == "BF16"
