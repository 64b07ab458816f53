"""Tools: auto, none, required, named, allowed, parallel or not; streamed and whole; and their results sent back."""

from __future__ import annotations

import json
from typing import Any

import openai
import pydantic
import pytest

from tests.conformance.harness import MODEL, Api, text_of

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIMER = {
    "type": "function",
    "function": {
        "name": "set_timer",
        "description": "Set a timer.",
        "parameters": {
            "type": "object",
            "properties": {"minutes": {"type": "integer", "minimum": 1, "maximum": 99}},
            "required": ["minutes"],
            "additionalProperties": False,
        },
    },
}
TOOLS = [WEATHER, TIMER]
QUESTION = "What is the weather in Rome?"


def calls_of(chunks: list[Any]) -> dict[int, dict[str, str]]:
    """Tool calls put together by index; checks that id, type and name come first and once."""
    calls: dict[int, dict[str, str]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            for delta in choice.delta.tool_calls or []:
                if delta.index not in calls:
                    assert delta.id
                    assert (delta.type, delta.index) == ("function", len(calls))
                    calls[delta.index] = {"id": delta.id, "name": delta.function.name, "arguments": ""}
                else:
                    assert delta.id is None
                    assert delta.function.name is None
                calls[delta.index]["arguments"] += delta.function.arguments or ""
    return calls


def test_auto_calls_a_tool(api: Api) -> None:
    answer = api.chat(QUESTION, tools=TOOLS, max_tokens=100)
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    assert call.type == "function"
    assert call.id
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    chunks = api.chat_events(QUESTION, tools=TOOLS, max_tokens=100, tool_choice="auto")
    [streamed] = calls_of(chunks).values()
    assert streamed["name"] == "get_weather"
    assert json.loads(streamed["arguments"]) == {"city": "Rome"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert text_of(chunks) == (choice.message.content or "")


def test_auto_may_answer_in_words(api: Api) -> None:
    choice = api.chat("Say hello.", tools=TOOLS, tool_choice="auto").choices[0]
    assert (choice.message.content is not None) or choice.message.tool_calls


def test_none_calls_nothing(api: Api) -> None:
    choice = api.chat(QUESTION, tools=TOOLS, tool_choice="none").choices[0]
    assert choice.message.tool_calls is None
    assert choice.finish_reason in ("stop", "length")


def test_required_calls_something(api: Api) -> None:
    choice = api.chat("Say hello.", tools=TOOLS, tool_choice="required", max_tokens=200).choices[0]
    assert choice.message.tool_calls
    names = {call.function.name for call in choice.message.tool_calls}
    assert names <= {"get_weather", "set_timer"}
    assert choice.finish_reason == "tool_calls"


@pytest.mark.parametrize("name", ["get_weather", "set_timer"])
def test_named_calls_that_one(api: Api, name: str) -> None:
    choice_field = {"type": "function", "function": {"name": name}}
    choice = api.chat(QUESTION, tools=TOOLS, tool_choice=choice_field, max_tokens=200).choices[0]
    [call] = choice.message.tool_calls
    assert call.function.name == name
    required = {"get_weather": "city", "set_timer": "minutes"}[name]
    assert set(json.loads(call.function.arguments)) == {required}
    chunks = api.chat_events(QUESTION, tools=TOOLS, tool_choice=choice_field, max_tokens=200)
    [streamed] = calls_of(chunks).values()
    assert streamed["arguments"] == call.function.arguments


def test_allowed_tools(api: Api) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "set_timer"}}]}
    tool_choice = {"type": "allowed_tools", "allowed_tools": allowed}
    choice = api.chat(QUESTION, tools=TOOLS, tool_choice=tool_choice, max_tokens=200).choices[0]
    assert {call.function.name for call in choice.message.tool_calls} == {"set_timer"}


def test_parallel_calls_can_be_forbidden(api: Api) -> None:
    choice = api.chat(
        "Set a timer for 3 minutes and tell me the weather in Oslo.",
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
    ).choices[0]
    assert len(choice.message.tool_calls) == 1


def test_results_go_back(api: Api) -> None:
    first = api.chat(QUESTION, tools=TOOLS, max_tokens=100).choices[0].message
    messages = [
        {"role": "user", "content": QUESTION},
        first.model_dump(),
        {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": '{"sky": "clear", "degrees": 21}'},
    ]
    choice = api.chat(None, messages=messages, tools=TOOLS, max_tokens=60).choices[0]
    assert choice.finish_reason in ("stop", "length", "tool_calls")
    assert choice.message.content or choice.message.tool_calls


def test_a_function_call_of_old_in_the_history(api: Api) -> None:
    old = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
    }
    messages = [{"role": "user", "content": QUESTION}, old, {"role": "user", "content": "And?"}]
    assert api.chat(None, messages=messages).choices[0].message.role == "assistant"


def test_parse_with_a_pydantic_tool(api: Api) -> None:
    class GetWeather(pydantic.BaseModel):
        """The weather in a city."""

        city: str

    tool = openai.pydantic_function_tool(GetWeather, name="get_weather")
    completion = api.call(
        lambda client: client.chat.completions.parse(
            model=MODEL,
            messages=[{"role": "user", "content": QUESTION}],
            tools=[tool],
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=0,
        )
    )
    [call] = completion.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, GetWeather)


def test_stream_helper_with_tools(api: Api) -> None:
    _, final = api.helper(
        lambda client: client.chat.completions.stream(
            model=MODEL,
            messages=[{"role": "user", "content": QUESTION}],
            tools=[WEATHER],
            tool_choice={"type": "function", "function": {"name": "get_weather"}},
            temperature=0,
        )
    )
    [call] = final.choices[0].message.tool_calls
    assert set(json.loads(call.function.arguments)) == {"city"}
