"""The score: what counts as an exact answer, and the embedded model through the engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from trine import LLM
from trine.core.errors import ConfigurationError
from trine.evaluation import Item, evaluate, is_right
from trine.evaluation.tools import render_call


def item(task: str, answer: str) -> Item:
    return Item(task, "", ({"role": "user", "content": ""},), answer)


def test_text_must_be_the_answer_to_the_character_and_end_by_itself() -> None:
    addition = item("addition", "17")
    assert is_right(addition, "17", stopped=True)
    assert not is_right(addition, "17", stopped=False)
    assert not any(is_right(addition, text, stopped=True) for text in ("17.", " 17", "17\n", "1 7", "18", ""))


def test_json_is_compared_as_a_value() -> None:
    extraction = item("extraction", '{"name": "Ada", "age": 36}')
    assert is_right(extraction, '{"age":36,"name":"Ada"}', stopped=True)
    for text in ('{"name": "Ada", "age": "36"}', '{"name": "Ada"}', '{"name": "Ada", "age": 36', "[36]", ""):
        assert not is_right(extraction, text, stopped=True)


def test_a_tool_call_is_the_whole_turn() -> None:
    calling = item("tool_calling", render_call("set_light", {"room": "attic", "on": True}))
    right = '<tool_call>{"arguments": {"on": true, "room": "attic"}, "name": "set_light"}</tool_call>'
    assert is_right(calling, right, stopped=True)
    assert not is_right(calling, right.replace("true", "1"), stopped=True)
    assert not is_right(calling, "Here: " + right, stopped=True)
    assert not is_right(calling, right + "\n" + right, stopped=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", max_model_len=1024, cache_bytes=1 << 26) as engine:
        yield engine


def test_the_embedded_model_through_the_engine(llm: LLM) -> None:
    """Short tasks, few items: at the 98 % and more of the model card, all but a few of ten are right."""
    seen: list[tuple[str, int, int]] = []
    tasks = ("addition", "copying", "extraction", "tool_calling", "stopping")
    shares = evaluate(llm, 10, tasks, lambda *progress: seen.append(progress), seed=11)
    assert tuple(shares) == tasks
    assert min(shares.values()) >= 0.8
    assert seen == [(task, 10, 10) for task in tasks]


def test_an_unknown_task_is_an_error(llm: LLM) -> None:
    with pytest.raises(ConfigurationError, match="there is no task 'spelling'; the tasks are addition"):
        evaluate(llm, 1, ["spelling"])
