"""Calling one of the tools offered in the prompt with the right arguments.

Half of the items use everyday tools with everyday phrasing, half tools whose names and parameters are put together at
random, so that the tool must be read from the prompt.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trine.evaluation.items import Item, Split, draw
from trine.evaluation.words import CITIES, COLORS, DAYS, FIRST_NAMES, MONTHS, NOUNS, OBJECTS, VERBS

MAX_TOOLS = 4

Tool = dict[str, Any]
Call = tuple[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Everyday:
    """A tool, the parameters it requires, and what people say when they want it."""

    name: str
    description: str
    parameters: dict[str, dict[str, Any]]
    values: Callable[[random.Random], dict[str, Any]]
    phrases: tuple[str, ...]


def _string(description: str, **extra: Any) -> dict[str, Any]:
    return {"type": "string", "description": description, **extra}


def _integer(description: str) -> dict[str, Any]:
    return {"type": "integer", "description": description}


EVERYDAY = (
    Everyday(
        "get_weather",
        "Get the current weather for a city",
        {"city": _string("The city")},
        lambda rng: {"city": rng.choice(CITIES)},
        ("What is the weather in {city}?", "What's the weather like in {city} today?", "How is the weather in {city}?"),
    ),
    Everyday(
        "get_current_weather",
        "Get the current weather in a given location",
        {
            "location": _string("The city"),
            "unit": _string("Unit of temperature", enum=["celsius", "fahrenheit"]),
        },
        lambda rng: {"location": rng.choice(CITIES), "unit": rng.choice(("celsius", "fahrenheit"))},
        ("What is the weather in {location} in {unit}?", "Tell me the temperature in {location} in {unit}."),
    ),
    Everyday(
        "get_time",
        "Get the current time in a city",
        {"city": _string("The city")},
        lambda rng: {"city": rng.choice(CITIES)},
        ("What time is it in {city}?", "Tell me the time in {city}."),
    ),
    Everyday(
        "add",
        "Add two numbers",
        {"a": _integer("First number"), "b": _integer("Second number")},
        lambda rng: {"a": rng.randrange(10000), "b": rng.randrange(10000)},
        ("Use the tool to add {a} and {b}.", "Add {a} and {b} with the tool."),
    ),
    Everyday(
        "set_timer",
        "Set a timer",
        {"minutes": _integer("Length in minutes")},
        lambda rng: {"minutes": rng.randint(1, 180)},
        ("Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes."),
    ),
    Everyday(
        "send_message",
        "Send a text message to a person",
        {"recipient": _string("Who gets the message"), "text": _string("The message")},
        lambda rng: {
            "recipient": rng.choice(FIRST_NAMES),
            "text": f"the {rng.choice(NOUNS)} is in the {rng.choice(NOUNS)}",
        },
        ("Send {recipient} the message: {text}", "Tell {recipient} that {text}", "Text {recipient}: {text}"),
    ),
    Everyday(
        "search",
        "Search the web",
        {"query": _string("What to search for")},
        lambda rng: {"query": f"{rng.choice(COLORS)} {rng.choice(NOUNS)} {rng.choice(NOUNS)}"},
        ("Search for {query}.", "Find {query} on the web.", "Look up {query} on the web."),
    ),
    Everyday(
        "book_flight",
        "Book a flight between two cities",
        {"origin": _string("From"), "destination": _string("To"), "day": _string("Day of the week")},
        lambda rng: (
            dict(zip(("origin", "destination"), rng.sample(CITIES, 2), strict=True)) | {"day": rng.choice(DAYS)}
        ),
        (
            "Book a flight from {origin} to {destination} on {day}.",
            "I need to fly from {origin} to {destination} on {day}.",
        ),
    ),
    Everyday(
        "create_event",
        "Put an event into the calendar",
        {"title": _string("Name of the event"), "date": _string("Date"), "hour": _integer("Hour of the day")},
        lambda rng: {
            "title": f"{rng.choice(NOUNS)} {rng.choice(('meeting', 'party', 'lesson', 'review'))}",
            "date": f"{rng.choice(MONTHS)} {rng.randint(1, 28)}",
            "hour": rng.randint(0, 23),
        },
        ("Put the {title} into my calendar for {date} at {hour}.", "Schedule the {title} on {date} at {hour}."),
    ),
    Everyday(
        "set_light",
        "Change the light in a room",
        {
            "room": _string("The room"),
            "color": _string("The color"),
            "on": {"type": "boolean", "description": "Light on"},
        },
        lambda rng: {
            "room": rng.choice(("kitchen", "cellar", "attic", "office", "garden", "library")),
            "color": rng.choice(COLORS),
            "on": True,
        },
        ("Turn on the {color} light in the {room}.", "Make the light in the {room} {color}."),
    ),
    Everyday(
        "convert_currency",
        "Convert an amount of money",
        {"amount": _integer("The amount"), "source": _string("Currency now"), "target": _string("Currency wanted")},
        lambda rng: (
            dict(
                zip(("source", "target"), rng.sample(("EUR", "USD", "GBP", "JPY", "CHF", "CAD", "AUD"), 2), strict=True)
            )
            | {"amount": rng.randint(1, 5000)}
        ),
        ("Convert {amount} {source} to {target}.", "How much is {amount} {source} in {target}?"),
    ),
    Everyday(
        "play_song",
        "Play music",
        {"artist": _string("The musician"), "volume": _integer("From 0 to 100")},
        lambda rng: {"artist": rng.choice(FIRST_NAMES), "volume": rng.randint(0, 100)},
        ("Play something by {artist} at volume {volume}.", "Play {artist} with the volume at {volume}."),
    ),
)

SYNONYMS = {
    "city": ("city", "city", "location", "place"),
    "location": ("location", "location", "city"),
    "recipient": ("recipient", "to", "person"),
    "text": ("text", "message", "body"),
    "query": ("query", "q", "text"),
    "origin": ("origin", "source"),
    "minutes": ("minutes", "duration"),
    "room": ("room", "place"),
}
"""Other names that everyday parameters go by."""

PARAMETERS: dict[str, tuple[str, Callable[[random.Random], Any]]] = {
    "name": ("string", lambda rng: rng.choice(FIRST_NAMES)),
    "city": ("string", lambda rng: rng.choice(CITIES)),
    "color": ("string", lambda rng: rng.choice(COLORS)),
    "day": ("string", lambda rng: rng.choice(DAYS)),
    "month": ("string", lambda rng: rng.choice(MONTHS)),
    "label": ("string", lambda rng: rng.choice(NOUNS)),
    "code": ("string", lambda rng: "".join(rng.choices(string.ascii_uppercase, k=2)) + str(rng.randint(10, 99))),
    "owner": ("string", lambda rng: rng.choice(FIRST_NAMES)),
    "count": ("integer", lambda rng: rng.randint(1, 99)),
    "number": ("integer", lambda rng: rng.randint(1, 9999)),
    "limit": ("integer", lambda rng: rng.randint(1, 500)),
    "level": ("integer", lambda rng: rng.randint(1, 10)),
    "id": ("integer", lambda rng: rng.randint(100, 99999)),
    "urgent": ("boolean", lambda rng: rng.random() < 0.5),
    "public": ("boolean", lambda rng: rng.random() < 0.5),
}

OPENINGS = (
    "Please {verb} the {noun} with {what}.",
    "{verb} a {noun} with {what}.",
    "I want to {verb} the {noun}: {what}.",
)


def as_tool(name: str, description: str, parameters: dict[str, dict[str, Any]]) -> Tool:
    """The OpenAI API's form of a tool; every parameter is required."""
    schema = {"type": "object", "properties": parameters, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def render_call(name: str, arguments: dict[str, Any]) -> str:
    """A tool call as the model writes it (the Hermes form)."""
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) + "\n</tool_call>"


def _spoken(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def everyday_request(rng: random.Random) -> tuple[Tool, Call, str]:
    """An everyday tool whose parameters go by one of their names, the right call of it, and the request."""
    tool = rng.choice(EVERYDAY)
    drawn = tool.values(rng)
    renamed = {name: rng.choice(SYNONYMS.get(name, (name,))) for name in tool.parameters}
    parameters = {renamed[name]: schema for name, schema in tool.parameters.items()}
    call = tool.name, {renamed[name]: drawn[name] for name in tool.parameters}
    return as_tool(tool.name, tool.description, parameters), call, rng.choice(tool.phrases).format(**drawn)


def random_tool(rng: random.Random) -> tuple[Tool, str, str]:
    """A tool of a random name with one to three parameters; its verb and its noun."""
    verb, noun = rng.choice(VERBS), rng.choice(OBJECTS)
    names = rng.sample(list(PARAMETERS), rng.randint(1, 3))
    parameters: dict[str, dict[str, Any]] = {name: {"type": PARAMETERS[name][0]} for name in names}
    if rng.random() < 0.5:
        for name in names:
            parameters[name]["description"] = f"The {name}"
    return as_tool(f"{verb}_{noun}", f"{verb.capitalize()} the {noun}", parameters), verb, noun


def random_request(rng: random.Random) -> tuple[Tool, Call, str]:
    tool, verb, noun = random_tool(rng)
    names = list(tool["function"]["parameters"]["properties"])
    arguments = {name: PARAMETERS[name][1](rng) for name in names}
    spoken = [f"{name} {_spoken(arguments[name])}" for name in rng.sample(names, len(names))]
    what = ", ".join(spoken[:-1]) + (" and " if len(spoken) > 1 else "") + spoken[-1]
    request = rng.choice(OPENINGS).format(verb=verb, noun=noun, what=what)
    return tool, (tool["function"]["name"], arguments), request[0].upper() + request[1:]


def offer(rng: random.Random, tool: Tool) -> tuple[Tool, ...]:
    """The tool among up to three others of other names, in random order."""
    tools = {tool["function"]["name"]: tool}
    for _ in range(rng.randint(0, MAX_TOOLS - 1)):
        other = random_tool(rng)[0] if rng.random() < 0.5 else everyday_request(rng)[0]
        tools.setdefault(other["function"]["name"], other)
    offered = list(tools.values())
    rng.shuffle(offered)
    return tuple(offered)


def tool_calling(rng: random.Random, split: Split) -> Item:
    """One call of one of up to four offered tools."""

    def propose() -> tuple[str, tuple[Tool, Call, str]]:
        tool, call, request = (everyday_request if rng.random() < 0.5 else random_request)(rng)
        return json.dumps([call[0], sorted(call[1].items())]), (tool, call, request)

    content, (tool, call, request) = draw("tool_calling", split, propose)
    messages = ({"role": "user", "content": request},)
    return Item("tool_calling", content, messages, render_call(*call), offer(rng, tool))
