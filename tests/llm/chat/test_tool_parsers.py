"""Calls of tools: whole and streamed, broken and forced."""

from __future__ import annotations

import functools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.llm.chat.templates_for_tests import CHATML, LLAMA3, MISTRAL, OLD
from tests.llm.tokenizers_for_tests import trained
from trine.core.errors import ConfigurationError, RequestError
from trine.llm.chat.events import ContentDelta, Event, ToolCall, ToolCallArguments, ToolCallStart
from trine.llm.chat.tool_parsers import _parsers, collect, detect_tool_parser, get_tool_parser, parse, tool_parser_names
from trine.llm.sampling.grammar import GrammarCompiler
from trine.llm.sampling.params import GuidedParams
from trine.llm.tokenizer import Tokenizer


def calls_of(name: str, text: str) -> tuple[str, list[tuple[str, Any]]]:
    content, calls = parse(get_tool_parser(name), text)
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


HERMES = '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": "x}"}}\n</tool_call>'
F = ("f", {"a": 1, "b": "x}"})


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", "Just text.\n", "Just text.\n", []),
        ("hermes", HERMES, "", [F]),
        ("hermes", f"Let me see.\n\n{HERMES}\n{HERMES}\nDone. ", "Let me see.Done. ", [F, F]),
        ("hermes", HERMES.removesuffix("\n</tool_call>"), "", [F]),
        ("hermes", '<tool_call>{"arguments": {}, "name": "g"}</tool_call>', "", [("g", {})]),
        ("hermes", '<tool_call>{"name": "g"}\n{"name": "h"}</tool_call>', "", [("g", {}), ("h", {})]),
        ("hermes", '<tool_call>{"name": "g", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("g", {"a": 1})]),
        ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', "", [("f", {"a": 1})]),
        (
            "llama3_json",
            '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
            "",
            [("f", {}), ("g", {})],
        ),
        ("llama3_json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
        ("llama3_json", 'See: {"name": "f", "parameters": {}}', 'See: {"name": "f", "parameters": {}}', []),
        ("llama3_json", '<|python_tag|>print("x")', '<|python_tag|>print("x")', []),
        (
            "mistral",
            '[TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"a": [1]}}]',
            "",
            [("f", {}), ("g", {"a": [1]})],
        ),
        ("mistral", 'Hi [TOOL_CALLS][{"arguments": {"a": 1}, "name": "f"}]', "Hi", [("f", {"a": 1})]),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]abc[ARGS]{}', "", [("f", {"a": 1}), ("g", {})]),
        ("mistral", '[TOOL_CALLS]get_time {"a": 1}', "", [("get_time", {"a": 1})]),
        ("mistral", "[1, 2]", "[1, 2]", []),
        ("pythonic", '[f(a=1, b="x"), m.g()]', "", [("f", {"a": 1, "b": "x"}), ("m.g", {})]),
        (
            "pythonic",
            "<|python_start|>[f(a=[true, None, -1.5], b={'k': 'v'})]<|python_end|>",
            "",
            [("f", {"a": [True, None, -1.5], "b": {"k": "v"}})],
        ),
        ("pythonic", '[f(a="\\ud83d\\ude00")]', "", [("f", {"a": "😀"})]),
        ("pythonic", "[f(1)]", "[f(1)]", []),
        ("pythonic", "[f(a=b)]", "[f(a=b)]", []),
        ("pythonic", "[f(a=1), 2]", "[f(a=1), 2]", []),
        ("pythonic", "[f(a=__import__('os'))]", "[f(a=__import__('os'))]", []),
        ("pythonic", "[1] is a list.", "[1] is a list.", []),
    ],
)
def test_messages(name: str, text: str, content: str, calls: list[Any]) -> None:
    assert calls_of(name, text) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call>\n",
        "a <tool_call> b </tool_call> c",
        '<tool_call>{"name": "f", "argum',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": f, "arguments": {}}</tool_call>',
        '<tool_call>{"nome": "f", "arguments": {}}</tool_call>',
        "<tool_call>[]</tool_call>",
        "  <tool_cal  ",
        " \n",
        "",
    ],
)
def test_what_is_no_call_stays_content_to_the_letter(text: str) -> None:
    assert calls_of("hermes", text) == (text, [])


def test_a_call_inside_of_a_broken_one_is_found() -> None:
    content, calls = calls_of("hermes", f"<tool_call>oops {HERMES}")
    assert (content, calls) == ("<tool_call>oops", [F])


def test_a_call_that_breaks_later_keeps_its_arguments_up_to_there() -> None:
    content, calls = parse(get_tool_parser("hermes"), '<tool_call>{"name": "f", "arguments": {"a": ?}}</tool_call>')
    assert [(call.name, call.arguments) for call in calls] == [("f", '{"a": ')]
    assert content == "?}}</tool_call>"
    _, cut = parse(get_tool_parser("hermes"), '<tool_call>{"name": "f", "arguments": {"a": "lon')
    assert [call.arguments for call in cut] == ['{"a": "lon']


def test_events_of_a_call_come_one_by_one() -> None:
    stream = get_tool_parser("hermes").stream()
    events = [event for char in f"Hi\n{HERMES}" for event in stream.push(char)] + stream.finish()
    start = next(event for event in events if isinstance(event, ToolCallStart))
    assert (start.index, start.name) == (0, "f")
    assert re.fullmatch(r"call_[A-Za-z0-9]{24}", start.id)
    assert events[:2] == [ContentDelta("H"), ContentDelta("i")]
    pieces = [event.text for event in events if isinstance(event, ToolCallArguments)]
    assert pieces == list('{"a": 1, "b": "x}"}')
    assert get_tool_parser("mistral").stream().push('[TOOL_CALLS]f{"')[0].id.isalnum()  # type: ignore[union-attr]


PIECES = [
    "<tool_call>",
    "</tool_call>",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[",
    "]",
    "{",
    "}",
    ",",
    ";",
    ":",
    " ",
    "\n",
    '"name"',
    '"arguments"',
    '"parameters"',
    '"f"',
    "f",
    "f(",
    ")",
    "a=1",
    '{"name": "f", "arguments": {"a": 1}}',
    '{"a": ',
    '{"name": "g", "parameters": {}}',
    '"{\\"a\\": 2}"',
    "<",
    "text",
    "1",
    "null",
    "\\",
]
MESSAGES = st.lists(st.sampled_from(PIECES), max_size=14).map("".join) | st.sampled_from([HERMES * 2, f"a {HERMES} b"])


def without_ids(events: list[Event]) -> tuple[str, list[tuple[str, str]]]:
    content, calls = collect(events)
    return content, [(call.name, call.arguments) for call in calls]


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral", "pythonic"])
@settings(max_examples=300, deadline=None)
@given(text=MESSAGES, seed=st.integers(0, 5))
def test_streamed_equals_whole_however_it_is_cut(name: str, text: str, seed: int) -> None:
    parser, cuts = get_tool_parser(name), random.Random(seed)
    stream, events, start = parser.stream(), [], 0
    while start < len(text):
        size = cuts.choice((1, 1, 2, 7))
        events += stream.push(text[start : start + size])
        start += size
    events += stream.finish()
    whole = parser.stream()
    assert without_ids(events) == without_ids(whole.push(text) + whole.finish())
    if not any(isinstance(event, ToolCallStart) for event in events):
        assert collect(events)[0] == text


def test_detection() -> None:
    assert [detect_tool_parser(source) for source in (CHATML, LLAMA3, MISTRAL, OLD, None)] == [
        "hermes",
        "llama3_json",
        "mistral",
        None,
        None,
    ]
    assert detect_tool_parser("<tool_call>\n<function=name>") is None


def test_names() -> None:
    assert get_tool_parser("qwen") is get_tool_parser("hermes")
    assert {"hermes", "llama3_json", "mistral", "pythonic"} <= set(tool_parser_names())
    with pytest.raises(ConfigurationError, match="'x' is unknown; choose one of hermes"):
        get_tool_parser("x")


def test_other_packages_add_parsers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shouting.py").write_text(
        "from trine.llm.chat.tool_parsers.formats import HermesParser\n"
        "class Shouting(HermesParser):\n"
        "    name = 'shouting'\n"
        "    def detect(self, chat_template):\n"
        "        return 'SHOUT' in chat_template\n"
    )
    metadata = tmp_path / "shouting-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[trine.tool_parsers]\nshouting = shouting:Shouting\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    _parsers.cache_clear()
    try:
        assert detect_tool_parser("SHOUT") == "shouting"
        assert get_tool_parser("shouting").name in tool_parser_names()
    finally:
        _parsers.cache_clear()


# --- forced calls ---------------------------------------------------------------------------------------------------

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 5},
                    "unit": {"enum": ["C", "F"]},
                    "days": {"$ref": "#/$defs/days"},
                },
                "required": ["city", "days"],
                "$defs": {
                    "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 2}
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
    {
        "type": "function",
        "function": {
            "name": "set",
            "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}, "level": {"enum": [1, 2]}}},
        },
    },
]


@functools.cache
def guided_tokenizer() -> tuple[Tokenizer, GrammarCompiler]:
    backend = trained("byte_level")
    tok = Tokenizer(backend, eos_token_ids=[backend.token_to_id("<|im_end|>")])
    return tok, GrammarCompiler(tok)


def random_text(guided: GuidedParams, seed: int) -> str:
    """A text that a grammar lets a model without any skill write."""
    tok, compiler = guided_tokenizer()
    draw, state, ids = random.Random(seed), compiler.new_state(compiler.compile(guided)), []
    mask = torch.zeros(-(-tok.vocab_size // 32), dtype=torch.int32)
    (end,) = tok.eos_token_ids
    while len(ids) < 600:
        state.fill_mask(mask)
        words = mask.tolist()
        allowed = [index for index in range(tok.vocab_size) if words[index // 32] >> (index % 32) & 1]
        if end in allowed and (len(allowed) == 1 or draw.random() < 0.7):
            return tok.decode(ids, skip_special_tokens=False)
        ids.append(draw.choice([index for index in allowed if index != end]))
        assert state.accept(ids[-1])
    raise AssertionError("the text does not end")


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral", "pythonic"])
@pytest.mark.parametrize(("choice", "parallel"), [(None, False), (None, True), ("get_weather", True), ("now", False)])
def test_forced_calls_are_certain(name: str, choice: str | None, parallel: bool) -> None:
    import jsonschema

    parser, (tok, _) = get_tool_parser(name), guided_tokenizer()
    guided = parser.forced_calls(TOOLS, choice, parallel, tok)
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {"maxProperties": 0}) for tool in TOOLS}
    counts, names = set(), set()
    for seed in range(12):
        text = random_text(guided, seed)
        content, calls = parse(parser, text)
        assert content == ""
        counts.add(len(calls))
        for call in calls:
            names.add(call.name)
            jsonschema.validate(json.loads(call.arguments), schemas[call.name])
    assert min(counts) == 1
    assert (max(counts) > 1) == (parallel and choice is None)
    assert names == ({choice} if choice else set(schemas))


def test_the_forced_text_is_the_trained_text() -> None:
    tok, _ = guided_tokenizer()
    hermes = get_tool_parser("hermes").forced_calls(TOOLS, "now", True, tok)
    assert f"<[{tok.hf.token_to_id('<tool_call>')}]>" in (hermes.grammar or ""), "the marker is one token"
    assert random_text(hermes, 0) == '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for with_tokens in (tok, None):
        llama = get_tool_parser("llama3_json").forced_calls(TOOLS, "set", False, with_tokens)
        texts = {random_text(llama, seed) for seed in range(40)}
        assert '{"name": "set", "parameters": {"on": true, "level": 2}}' in texts
        assert '{"name": "set", "parameters": {}}' in texts


def test_calls_that_can_not_be_forced_are_errors() -> None:
    parser = get_tool_parser("hermes")
    with pytest.raises(RequestError, match="'x', which is not among the tools: 'get_weather', 'now', 'set'"):
        parser.forced_calls(TOOLS, "x", True)
    with pytest.raises(RequestError, match="tools is empty"):
        parser.forced_calls([], None, True)
    odd = {"name": "f", "parameters": {"properties": {"a": {"type": "array", "uniqueItems": True}}}}
    with pytest.raises(RequestError, match=r"parameters of 'f': .*'uniqueItems' at #/properties/a can't be enforced"):
        parser.forced_calls([{"type": "function", "function": odd}], None, True)
    with pytest.raises(RequestError, match="JSON schema of an object"):
        parser.forced_calls([{"type": "function", "function": {"name": "f", "parameters": 3}}], None, True)


def test_calls_are_plain_records() -> None:
    _, calls = parse(get_tool_parser("hermes"), HERMES)
    assert calls == [ToolCall(calls[0].id, "f", '{"a": 1, "b": "x}"}')]
