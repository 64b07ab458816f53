"""Thinking apart from answering, and the whole message."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.llm.chat.templates_for_tests import CHATML, OLD
from trine.core.errors import ConfigurationError
from trine.llm.chat.events import ContentDelta, ReasoningDelta, ToolCallArguments, ToolCallStart
from trine.llm.chat.output import Message, MessageStream, parse_message
from trine.llm.chat.reasoning_parsers import detect_reasoning_parser, get_reasoning_parser, reasoning_parser_names
from trine.llm.chat.tool_parsers import get_tool_parser

THINK = get_reasoning_parser("think")
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<think>\nFirst.\nThen.\n</think>\n\nYes. ", False, "First.\nThen.", "Yes. "),
        ("First.</think>Yes.", True, "First.", "Yes."),
        ("First, and no end", True, "First, and no end", ""),
        ("<think>cut </thi", False, "cut </thi", ""),
        ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
        ("No thoughts. <think>x</think>", False, "", "No thoughts. <think>x</think>"),
        ("  <thin", False, "", "  <thin"),
        ("  plain", False, "", "  plain"),
        ("\n<think>a < b </ c</think>d", False, "a < b </ c", "d"),
        ("", True, "", ""),
    ],
)
def test_reasoning_is_split_off(text: str, opened: bool, reasoning: str, content: str) -> None:
    assert THINK.parse(text, opened) == (reasoning, content)


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "a", " ", "\n", "think>"]), max_size=10).map(
        "".join
    ),
    opened=st.booleans(),
    seed=st.integers(0, 5),
)
def test_streamed_equals_whole_however_it_is_cut(text: str, opened: bool, seed: int) -> None:
    cuts, stream, events, start = random.Random(seed), THINK.stream(opened), [], 0
    while start < len(text):
        size = cuts.choice((1, 2, 5))
        events += stream.push(text[start : start + size])
        start += size
    events += stream.finish()
    reasoning = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
    content = "".join(event.text for event in events if isinstance(event, ContentDelta))
    assert (reasoning, content) == THINK.parse(text, opened)


def test_the_prompt_may_have_opened_it() -> None:
    assert THINK.opened_by("<|im_start|>assistant\n<think>\n")
    assert not THINK.opened_by("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not THINK.opened_by("<|im_start|>assistant\n")


def test_a_whole_message() -> None:
    parsers = get_tool_parser("hermes"), THINK
    message = parse_message(f"<think>Hm {CALL}</think>Let me see.\n{CALL}", *parsers)
    assert (message.reasoning, message.content) == (f"Hm {CALL}", "Let me see.")
    assert [(call.name, call.arguments) for call in message.tool_calls] == [("f", '{"a": 1}')]
    assert parse_message("Hm</think>Yes", None, THINK, prompt="<think>") == Message("Yes", "Hm", [])
    assert parse_message(f"<think>{CALL}", None, None) == Message(f"<think>{CALL}", "", [])


def test_a_message_as_it_comes() -> None:
    stream = MessageStream(get_tool_parser("hermes"), THINK)
    events = [event for char in f"<think>ab</think>c{CALL}" for event in stream.push(char)] + stream.finish()
    assert events[:3] == [ReasoningDelta("a"), ReasoningDelta("b"), ContentDelta("c")]
    assert isinstance(events[3], ToolCallStart)
    assert all(isinstance(event, ToolCallArguments) for event in events[4:])


def test_names() -> None:
    assert (detect_reasoning_parser(CHATML), detect_reasoning_parser(OLD), detect_reasoning_parser(None)) == (
        "think",
        None,
        None,
    )
    assert get_reasoning_parser("deepseek_r1") is THINK
    assert "mistral_think" in reasoning_parser_names()
    with pytest.raises(ConfigurationError, match="'x' is unknown"):
        get_reasoning_parser("x")
