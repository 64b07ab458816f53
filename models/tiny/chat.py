"""Chat text: what `chat_template.jinja` renders, in Python for speed, and everyday conversations to train on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from models.tiny.facts import CAPITALS, COUNTS, FACTS, GREETINGS, PERSONAS, SMALL_TALK
from models.tiny.stories import article, listed, unknown, written
from trine.evaluation.items import SYSTEM_PROMPTS, Message
from trine.evaluation.tools import everyday_request, offer, random_request, render_call
from trine.evaluation.words import ADJECTIVES, CITIES, COLORS, DAYS, FIRST_NAMES, NOUNS, words_of

SMALL_WORDS = words_of("this is a test of the in and it I you we one two yes no hello world")

Segment = tuple[str, bool]
"""A piece of a document, and whether the model is to produce it."""

TOOLS_HEAD = "# Tools\nThese functions can be called:\n<tools>"
TOOLS_TAIL = (
    "\n</tools>\nTo call one, write its name and its arguments as JSON:\n"
    '<tool_call>\n{"name": "…", "arguments": {…}}\n</tool_call>'
)


def render(messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[Segment]:
    """The conversation as the chat template renders it, cut before and after each thing the assistant says."""
    segments: list[Segment] = []
    given = ""
    if tools or messages[0]["role"] == "system":
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        if tools:
            listed = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
            system += ("\n\n" if system else "") + TOOLS_HEAD + listed + TOOLS_TAIL
        given = f"<|im_start|>system\n{system}<|im_end|>\n"
    previous = ""
    for index, message in enumerate(messages):
        role = message["role"]
        following = messages[index + 1]["role"] if index + 1 < len(messages) else ""
        if role == "assistant":
            segments += [(given + "<|im_start|>assistant\n", False), (message["content"] + "<|im_end|>", True)]
            given = "\n"
        elif role == "tool":
            given += "<|im_start|>user" if previous != "tool" else ""
            given += f"\n<tool_response>\n{message['content']}\n</tool_response>"
            given += "<|im_end|>\n" if following != "tool" else ""
        elif role == "user":
            given += f"<|im_start|>user\n{message['content']}<|im_end|>\n"
        previous = role
    return [*segments, (given, False)]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


class Conversations:
    """Small talk, facts, definitions and conversations with tools, drawn at random.

    `definitions` maps nouns to their glosses (of WordNet).
    """

    def __init__(self, definitions: dict[str, str]) -> None:
        self.definitions = list(definitions.items())

    def draw(self, rng: random.Random) -> list[Segment]:
        if rng.random() < 0.2:
            return self.with_tools(rng)
        name = "Tiny"
        messages: list[Message] = []
        if rng.random() < 0.6:
            system, name = self.persona(rng) if rng.random() < 0.6 else (rng.choice(SYSTEM_PROMPTS), name)
            messages.append({"role": "system", "content": system})
        for _ in range(rng.choice((1, 1, 2, 3))):
            messages += self.exchange(rng, name)
        return render(messages)

    def persona(self, rng: random.Random) -> tuple[str, str]:
        """A system prompt that gives the assistant a name, and the name."""
        name = rng.choice(
            (rng.choice(FIRST_NAMES), rng.choice(NOUNS).capitalize(), rng.choice(ADJECTIVES).capitalize())
        )
        return rng.choice(PERSONAS).format(name=name), name

    def exchange(self, rng: random.Random, name: str) -> list[Message]:
        """A question and its answer, now and then two of each."""
        kind = rng.random()
        if kind < 0.08:
            return self.acquaintance(rng)
        if kind < 0.18:
            asked, told = rng.choice(GREETINGS), rng.choice(SMALL_TALK["greeting"])
        elif kind < 0.28:
            asked, told = rng.choice(SMALL_TALK["who"]), rng.choice(SMALL_TALK["who_answer"])
        elif kind < 0.42:
            word, gloss = self.definitions[int(len(self.definitions) * rng.random() ** 1.5)]
            asked = rng.choice(SMALL_TALK["define"]).format(word=word, article=article(word).split()[0])
            told = f"{gloss[0].upper()}{gloss[1:]}."
        elif kind < 0.54:
            country, capital = rng.choice(CAPITALS)
            asked = rng.choice(SMALL_TALK["capital"]).format(country=country)
            told = f"The capital of {country} is {capital}."
        elif kind < 0.57:
            thing, count = rng.choice(COUNTS)
            asked, told = f"How many {thing}?", f"{count}."
        elif kind < 0.7:
            asked, told = written(rng)
        elif kind < 0.77:
            asked, told = listed(rng)
        elif kind < 0.84:
            asked, told = unknown(rng)
        elif kind < 0.88:
            told = " ".join(rng.choice((*ADJECTIVES, *NOUNS, *SMALL_WORDS)) for _ in range(rng.randint(1, 6)))
            asked = rng.choice(("Say {told}", "Say: {told}", 'Say "{told}"', "Please say {told}")).format(told=told)
        else:
            asked, told = rng.choice(FACTS)
        return [user(asked.format(name=name)), assistant(told.format(name=name) if "{name}" in told else told)]

    def acquaintance(self, rng: random.Random) -> list[Message]:
        """The user says a name and asks for it later."""
        name = rng.choice(FIRST_NAMES)
        hello = rng.choice(("My name is {name}.", "I am {name}.", "Hi, I'm {name}.", "Hello, my name is {name}."))
        ask = rng.choice(("What is my name?", "Who am I?", "Do you know my name?", "What's my name?"))
        return [
            user(hello.format(name=name)),
            assistant(rng.choice(("Hello {name}!", "Hello {name}! How can I help you?")).format(name=name)),
            *(self.exchange(rng, "Tiny")[:2] if rng.random() < 0.3 else []),
            user(ask),
            assistant(f"Your name is {name}."),
        ]

    def with_tools(self, rng: random.Random) -> list[Segment]:
        """A call and the answer from its result; two calls at once; or a question that needs no tool."""
        tool, call, request = everyday_request(rng) if rng.random() < 0.7 else random_request(rng)
        tools = offer(rng, tool)
        messages: list[Message] = []
        if rng.random() < 0.4:
            messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        kind = rng.random()
        if kind < 0.35:
            messages += self.exchange(rng, "Tiny")
            return render(messages, tools)
        if kind < 0.55:
            second = self.second_request(rng, call, request)
            if second is not None:
                both, other = second
                messages += [user(both), assistant(render_call(*call) + "\n" + render_call(call[0], other))]
                return render(messages, tools)
        messages += [user(request), assistant(render_call(*call))]
        result, answer = self.result(rng, call)
        messages += [{"role": "tool", "content": result}, assistant(answer)]
        return render(messages, tools)

    def second_request(
        self, rng: random.Random, call: tuple[str, dict[str, Any]], request: str
    ) -> tuple[str, dict[str, Any]] | None:
        """The request for two values of one argument, and the second call's arguments; None if there is none."""
        pools = [
            (name, value, pool)
            for name, value in call[1].items()
            for pool in (CITIES, FIRST_NAMES, COLORS, DAYS, NOUNS)
            if value in pool and request.count(value) == 1
        ]
        if not pools:
            return None
        name, value, pool = rng.choice(pools)
        other = rng.choice([candidate for candidate in pool if candidate != value])
        joined = rng.choice(
            (f"{value} and {other}", f"{value} and in {other}" if pool is CITIES else f"{value} and {other}")
        )
        both = rng.choice((request.replace(value, joined), f"{request} {request.replace(value, other)}"))
        return both, {**call[1], name: other}

    def result(self, rng: random.Random, call: tuple[str, dict[str, Any]]) -> tuple[str, str]:
        """What a tool returned, and the sentence that tells it."""
        if "weather" in call[0]:
            degrees, sky = rng.randint(-9, 38), rng.choice(("sunny", "cloudy", "rainy", "windy", "foggy"))
            place = next(iter(call[1].values()))
            shape = rng.randrange(3)
            if shape == 0:
                text = json.dumps({"temperature": degrees, "condition": sky})
                return text, f"It is {degrees} degrees and {sky} in {place}."
            if shape == 1:
                return f"{degrees} degrees, {sky}", f"It is {degrees} degrees and {sky} in {place}."
            return sky, f"It is {sky} in {place}."
        if "time" in call[0] and rng.random() < 0.7:
            clock = f"{rng.randrange(24)}:{rng.randrange(60):02}"
            return rng.choice((clock, json.dumps({"time": clock}))), f"It is {clock}."
        if rng.random() < 0.5:
            value = str(rng.randrange(10 ** rng.randint(1, 5))) if rng.random() < 0.6 else rng.choice(NOUNS)
            key = rng.choice(("result", "value", "answer"))
            return rng.choice((value, json.dumps({key: value}))), f"The result is {value}."
        return rng.choice(('{"status": "ok"}', "ok", "done", '{"success": true}')), "Done."
