"""The items: right answers, the same for the same seed, and training apart from evaluation whatever the seeds."""

from __future__ import annotations

import json
import random
import re
from collections import Counter

import pytest

from trine.evaluation import TASKS, Item, make_item, make_items, split_of
from trine.evaluation.lookup import make_table
from trine.llm.loading import resolve_model
from trine.llm.tokenizer import Tokenizer


def count_tokens(texts: list[str]) -> list[int]:
    """A stand-in for the tokenizer's count."""
    return [len(text) // 3 + 1 for text in texts]


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def items(task: str, split: str, seed: int, count: int = 100) -> list[Item]:
    assert split in ("train", "heldout")
    return make_items(task, seed, 8 if task == "lookup_3500" else count, split, count_tokens)


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_disjoint_whatever_the_seed(task: str) -> None:
    train = {item.content for seed in range(4) for item in items(task, "train", seed)}
    heldout = {item.content for seed in range(4) for item in items(task, "heldout", seed)}
    assert not train & heldout
    hashed = "lookup" if task == "lookup_3500" else task
    assert {split_of(hashed, content) for content in train} == {"train"}
    assert {split_of(hashed, content) for content in heldout} == {"heldout"}


def test_the_split_depends_on_what_determines_the_answer_alone() -> None:
    """The same sum, phrased and ordered differently, has the same content."""
    by_content: dict[str, set[str]] = {}
    rng = random.Random(0)
    for _ in range(20000):
        item = make_item("addition", rng, "train", count_tokens)
        first, second = numbers(item.messages[-1]["content"])
        assert item.content == f"{min(first, second)}+{max(first, second)}"
        by_content.setdefault(item.content, set()).add(item.messages[-1]["content"])
    assert any(len(texts) > 3 for texts in by_content.values())


def test_no_pair_of_a_training_list_is_held_out() -> None:
    rng = random.Random(0)
    for _ in range(20):
        table = make_table(rng, "train", 1000, count_tokens)
        assert {split_of("lookup", f"{key}={value}") for key, value in table.pairs} == {"train"}


def test_a_tenth_is_held_out() -> None:
    shares = Counter(split_of("addition", f"{a}+{b}") for a in range(200) for b in range(a, 200))
    assert 0.09 < shares["heldout"] / shares.total() < 0.11


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_the_same_items(task: str) -> None:
    first, again, other = (items(task, "heldout", seed, 20) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert items(task, "heldout", 3, 10) == first[:10] or task == "lookup_3500"


@pytest.mark.parametrize("task", TASKS)
def test_items_are_chat_turns_with_and_without_a_system_prompt(task: str) -> None:
    roles = Counter(tuple(message["role"] for message in item.messages) for item in items(task, "train", 0, 60))
    assert set(roles) == {("user",), ("system", "user")}


def test_arithmetic_answers() -> None:
    signs = set()
    for item in items("addition", "train", 0):
        assert int(item.answer) == sum(numbers(item.messages[-1]["content"]))
    for item in items("subtraction", "train", 0):
        text = item.messages[-1]["content"]
        first, second = reversed(numbers(text)) if text.startswith("Subtract") else numbers(text)
        assert int(item.answer) == first - second
        signs.add(int(item.answer) < 0)
    assert signs == {True, False}


def test_sequence_answers() -> None:
    for item in items("sorting", "train", 0):
        asked, answered = numbers(item.messages[-1]["content"]), numbers(item.answer)
        assert answered == sorted(asked, reverse=answered[0] > answered[-1])
    for item in items("reversing", "train", 0):
        parts = re.split(r", | |-", item.answer)
        listed = re.split(r", | |-", item.messages[-1]["content"])[-len(parts) :]
        assert parts == listed[::-1]
    for item in items("copying", "train", 0):
        assert item.messages[-1]["content"].endswith(item.answer)
    for item in items("stopping", "train", 0):
        text = item.messages[-1]["content"]
        if "from" in text:
            first, last = numbers(text)
            assert numbers(item.answer) == list(range(first, last + 1))
        else:
            assert len(re.split(r", | ", item.answer)) == numbers(text)[0]


def test_counts() -> None:
    for item in items("counting", "train", 0):
        listed = re.split(r", | ", re.split(r"\? |: ", item.messages[-1]["content"])[-1])
        target = re.match(r"(\S+) in |length ", item.content)
        assert target is not None
        assert int(item.answer) == (listed.count(target[1]) if target[1] else len(listed))


def test_lookups_have_the_right_value_and_the_right_length() -> None:
    tokenizer = Tokenizer.from_directory(resolve_model("tiny"))

    def count(texts: list[str]) -> list[int]:
        return [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]

    for task in ("lookup", "lookup_3500"):
        for item in make_items(task, 0, 25, "heldout", count):
            text = "\n".join(message["content"] for message in item.messages)
            key = item.content.removesuffix(f"={item.answer}")
            line = rf"^(?:- )?{re.escape(key)}(?:: | = | -> ){re.escape(item.answer)}$"
            assert len(re.findall(line, text, re.MULTILINE)) == 1
            (tokens,) = count([text])
            assert tokens < 3600
            assert task == "lookup" or tokens > 3450


def test_extraction_answers_are_the_fields_asked_for() -> None:
    for item in items("extraction", "train", 0):
        record, answer = json.loads(item.content), json.loads(item.answer)
        assert answer == {name: record[name] for name in answer}
        assert all(name in item.messages[-1]["content"] for name in answer)


def test_tool_calls_fit_the_schema_of_an_offered_tool() -> None:
    types = {"string": str, "integer": int, "boolean": bool}
    for item in items("tool_calling", "train", 0, 300):
        call = json.loads(item.answer.removeprefix("<tool_call>").removesuffix("</tool_call>"))
        offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in item.tools}
        assert len(offered) == len(item.tools) <= 4
        schema = offered[call["name"]]
        assert set(call["arguments"]) == set(schema["properties"]) == set(schema["required"])
        for name, value in call["arguments"].items():
            assert type(value) is types[schema["properties"][name]["type"]]
