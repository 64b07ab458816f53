"""Rendering equals Transformers'; templates that fail, or attack, are errors of the request."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.llm.chat.templates_for_tests import ALL, CHATML, EITHER, LLAMA3, MISTRAL, OLD, PARTS
from tests.llm.tokenizers_for_tests import trained
from trine.core.errors import RequestError
from trine.llm.chat.templates import ChatTemplates, content_format
from trine.llm.tokenizer import Tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather <now> in a city's centre, é",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
PLAIN = [
    {"role": "user", "content": 'Hi <b>there</b> & "you" '},
    {"role": "assistant", "content": " Hello! "},
    {"role": "user", "content": "日本?\n"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *PLAIN]
CALLS = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "abcdefghi",
                "type": "function",
                "function": {"name": "get_weather", "arguments": {"city": "Zürich"}},
            }
        ],
    },
    {"role": "user", "content": "And?"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("reference") / "tokenizer.json"
    trained("byte_level").save(str(path))
    return PreTrainedTokenizerFast(tokenizer_file=str(path), **SPECIAL)


def render(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    options.setdefault("add_generation_prompt", True)
    tools = options.pop("tools", None)
    prompt = options.pop("add_generation_prompt")
    templates = ChatTemplates({"default": source})
    return templates.render(messages, tools=tools, add_generation_prompt=prompt, variables={**SPECIAL, **options})


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "old", "either"])
@pytest.mark.parametrize("conversation", [PLAIN, SYSTEM, CALLS], ids=["plain", "system", "calls"])
@pytest.mark.parametrize(
    "options",
    [{}, {"tools": TOOLS}, {"add_generation_prompt": False}, {"enable_thinking": False, "documents": [{"text": "d"}]}],
    ids=["bare", "tools", "closed", "variables"],
)
def test_text_equals_transformers(
    reference: Any, name: str, conversation: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    expected = reference.apply_chat_template(
        conversation, chat_template=ALL[name], tokenize=False, **{"add_generation_prompt": True, **options}
    )
    assert render(ALL[name], conversation, **options) == expected


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "old"])
@pytest.mark.parametrize("final", ["The answer is", "Trailing space ", "line\n"])
def test_a_continued_message_equals_transformers(reference: Any, name: str, final: str) -> None:
    conversation = [*PLAIN, {"role": "assistant", "content": final}]
    expected = reference.apply_chat_template(
        conversation, chat_template=ALL[name], tokenize=False, continue_final_message=True
    )
    assert render(ALL[name], conversation, add_generation_prompt=False, continue_final_message=True) == expected
    assert expected.rstrip().endswith(final.rstrip())


def test_a_continued_message_needs_text_and_no_new_turn() -> None:
    with pytest.raises(RequestError, match="add_generation_prompt=false"):
        render(CHATML, PLAIN, continue_final_message=True)
    with pytest.raises(RequestError, match="no text to continue"):
        render(
            CHATML, [{"role": "assistant", "content": None}], add_generation_prompt=False, continue_final_message=True
        )
    with pytest.raises(RequestError, match="drops or changes"):
        render("nothing", PLAIN, add_generation_prompt=False, continue_final_message=True)


def test_content_parts() -> None:
    assert [content_format(source) for source in (CHATML, PARTS, EITHER)] == ["string", "parts", "both"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert render(OLD, parts, add_generation_prompt=False) == "user: a\nb\n"
    assert render(EITHER, parts) == "<user>[a][b]\n"
    assert render(PARTS, parts) == "<user>ab\n"
    assert render(PARTS, [{"role": "user", "content": "text"}]) == "<user>text\n"
    with pytest.raises(
        RequestError, match=r"messages\[0\]\.content\[0\] has type 'image_url'; this model takes text only"
    ):
        render(CHATML, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


def test_messages_of_openai_clients() -> None:
    """Arguments as JSON text, null content, ids of any length, null fields, the developer role."""
    calls = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Weather?", "name": None},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "tool_calls": [
                {
                    "id": "call_0123456789abcdefABCDEFGH",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'},
                }
            ],
        },
    ]
    assert '"arguments": {"city": "Zürich"}' in render(CHATML, calls)
    assert render(CHATML, calls).startswith("<|im_start|>system\nBe brief.")
    assert render(LLAMA3, calls).count('"parameters": {"city": "Zürich"}') == 1
    assert '"id": "' in render(MISTRAL, calls)
    broken = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{nonsense"}}]}]
    assert "{nonsense" in render(CHATML, broken)
    assert calls[2]["tool_calls"][0]["function"]["arguments"] == '{"city": "Zürich"}', "the argument is left alone"


@pytest.mark.parametrize(
    ("source", "messages", "message"),
    [
        (OLD, [{"role": "tool", "content": "x"}], "Only user, assistant and system"),
        ("{% for %}", PLAIN, "line 1"),
        ("{{ messages[7].content.x }}", PLAIN, "refuses"),
        ("{{ 1 / 0 }}", PLAIN, "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", PLAIN, "unsafe"),
        ("{{ messages.append(1) }}", PLAIN, "refuses"),
        (CHATML, [], "at least one"),
        (CHATML, "hello", "list"),
        (CHATML, [{"content": "x"}], r"messages\[0\] must be an object with a role"),
        (CHATML, [{"role": "user", "content": 3}], "string or a list"),
        (CHATML, [{"role": "user", "content": [3]}], "type 'text'"),
    ],
)
def test_errors_are_the_requests(source: str, messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        render(source, messages)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{{ range(10**9) | list }}",
        "{{ 'x' * 10**9 }}",
        "{{ [0] * 10**9 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'x'.center(10**9) }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ 'x' | indent(1000000000, true) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}",
        "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x.replace('x', 'xx') %}{% endfor %}",
        "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x | replace('x', 'xx') %}{% endfor %}",
        "{% set n = namespace(x='xx') %}{% for i in range(50) %}{% set n.x %}{{n.x}}{{n.x}}{% endset %}{% endfor %}",
    ],
)
def test_bombs_are_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trine.llm.chat.sandbox.MAX_SECONDS", 0.3)
    with pytest.raises(RequestError, match=r"stopped|fails|refuses"):
        render(source, PLAIN)


def test_long_conversations_are_no_bombs() -> None:
    turns = [{"role": role, "content": "word " * 200} for _ in range(1000) for role in ("user", "assistant")]
    for source in (CHATML, LLAMA3, MISTRAL):
        assert render(source, turns).count("word") == 400_000


def test_the_checkpoints_templates(tmp_path: Path) -> None:
    trained("byte_level").save(str(tmp_path / "tokenizer.json"))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": "<s>", "chat_template": "{{ bos_token }}one"}))
    assert Tokenizer.from_directory(tmp_path).render_chat(PLAIN) == "<s>one"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    config.write_text(json.dumps({"chat_template": named}))
    tok = Tokenizer.from_directory(tmp_path)
    assert (tok.render_chat(PLAIN), tok.render_chat(PLAIN, tools=TOOLS)) == ("plain", "tools")
    assert tok.render_chat(PLAIN, chat_template="tool_use") == "tools"
    assert tok.render_chat(PLAIN, chat_template="{{ x }}", x="given") == "given"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.from_directory(tmp_path).render_chat(PLAIN) == "from the file"
    config.write_text("{}")
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from JSON"}))
    assert Tokenizer.from_directory(tmp_path).render_chat(PLAIN) == "from JSON"


def test_a_model_without_a_template() -> None:
    tok = Tokenizer(trained("byte_level"))
    assert not tok.has_chat_template
    with pytest.raises(RequestError, match="no chat template"):
        tok.render_chat(PLAIN)
    with pytest.raises(RequestError, match="name one of a, b"):
        ChatTemplates({"a": "", "b": ""}).render(PLAIN)


def test_the_date_is_todays() -> None:
    before = datetime.now().strftime("%Y")
    assert render("{{ strftime_now('%Y') }}", PLAIN) in (before, datetime.now().strftime("%Y"))
    assert time.strftime("%Y") >= before
