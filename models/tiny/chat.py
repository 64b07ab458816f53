"""Chat text: what `chat_template.jinja` renders, in Python (thirty times as fast), and everyday conversations to train on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from facts import CAPITALS, COUNTS, FACTS, GREETINGS, PERSONAS, SMALL_TALK

from trine.evaluation.items import SYSTEM_PROMPTS, Message
from trine.evaluation.tools import everyday_request, offer, random_request, render_call
from trine.evaluation.words import ADJECTIVES, FIRST_NAMES, NOUNS

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
        name = rng.choice((rng.choice(FIRST_NAMES), rng.choice(NOUNS).capitalize(), rng.choice(ADJECTIVES).capitalize()))
        return rng.choice(PERSONAS).format(name=name), name

    def exchange(self, rng: random.Random, name: str) -> list[Message]:
        kind = rng.random()
        if kind < 0.2:
            asked, told = rng.choice(GREETINGS), rng.choice(SMALL_TALK["greeting"])
        elif kind < 0.35:
            asked, told = rng.choice(SMALL_TALK["who"]), rng.choice(SMALL_TALK["who_answer"])
        elif kind < 0.55:
            word, gloss = self.definitions[int(len(self.definitions) * rng.random() ** 1.5)]
            article = "an" if word[0] in "aeiou" else "a"
            asked = rng.choice(SMALL_TALK["define"]).format(word=word, article=article)
            told = f"{gloss[0].upper()}{gloss[1:]}."
        elif kind < 0.75:
            country, capital = rng.choice(CAPITALS)
            asked = rng.choice(SMALL_TALK["capital"]).format(country=country)
            told = f"The capital of {country} is {capital}."
        elif kind < 0.8:
            thing, count = rng.choice(COUNTS)
            asked, told = f"How many {thing}?", f"{count}."
        else:
            asked, told = rng.choice(FACTS)
        return [user(asked.format(name=name)), assistant(told.format(name=name))]

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
        messages += [user(request), assistant(render_call(*call))]
        if kind < 0.5:
            other = {**call[1]}
            changed = next((key for key in other if isinstance(other[key], str)), None)
            if changed is not None:
                other[changed] = rng.choice(NOUNS)
                messages[-2] = user(f"{request} Then do the same with {changed} {other[changed]}.")
                messages[-1] = assistant(render_call(*call) + "\n" + render_call(call[0], other))
                return render(messages, tools)
        result, answer = self.result(rng, call)
        messages += [{"role": "tool", "content": result}, assistant(answer)]
        return render(messages, tools)

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
