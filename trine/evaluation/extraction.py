"""Extracting fields from a sentence into a JSON object whose keys are given."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from trine.evaluation.items import Item, Split, draw
from trine.evaluation.words import ADJECTIVES, CITIES, COLORS, DAYS, FIRST_NAMES, JOBS, LAST_NAMES, MONTHS, NOUNS

Record = dict[str, str | int]

REQUESTS = (
    "Extract {fields} as JSON: {sentence}",
    "Extract the fields {fields} from this sentence as JSON.\n{sentence}",
    "Return a JSON object with {fields}.\n{sentence}",
    "{sentence}\nGive {fields} as JSON.",
)

PERSON = (
    "{name} is {age} years old, lives in {city} and works as a {job}.",
    "{name}, {age}, is a {job} from {city}.",
    "The {job} {name} moved to {city} at the age of {age}.",
    "In {city} we met {name}, a {job} who is {age}.",
    "At {age}, {name} still works as a {job} in {city}.",
)
ORDER = (
    "{customer} ordered {quantity} {color} {item}s for {price} dollars.",
    "An order of {quantity} {color} {item}s was placed by {customer}, who paid {price} dollars.",
    "{customer} bought {quantity} {item}s in {color} and paid {price} dollars.",
    "For {price} dollars, {customer} got {quantity} {color} {item}s.",
)
EVENT = (
    "The {title} takes place in {city} on {day}, {date}, at {hour} o'clock.",
    "On {day}, {date}, at {hour} o'clock, {city} hosts the {title}.",
    "Come to {city} for the {title}: {day}, {date}, {hour} o'clock.",
    "{city} will hold the {title} on {day}, {date}. Doors open at {hour} o'clock.",
)
MESSAGE = (
    "{sender} wrote to {recipient} about the {subject} and asked for room {room}.",
    "{recipient} got a message from {sender} about the {subject} in room {room}.",
    "About the {subject} in room {room}: {sender} has told {recipient}.",
)


def _full_name(rng: random.Random) -> str:
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def _person(rng: random.Random) -> Record:
    return {
        "name": _full_name(rng),
        "age": rng.randint(18, 99),
        "city": rng.choice(CITIES),
        "job": rng.choice(JOBS),
    }


def _order(rng: random.Random) -> Record:
    return {
        "customer": _full_name(rng),
        "quantity": rng.randint(2, 99),
        "color": rng.choice(COLORS),
        "item": rng.choice(NOUNS),
        "price": rng.randint(5, 999),
    }


def _event(rng: random.Random) -> Record:
    return {
        "title": f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} festival",
        "city": rng.choice(CITIES),
        "day": rng.choice(DAYS),
        "date": f"{rng.choice(MONTHS)} {rng.randint(1, 28)}",
        "hour": rng.randint(1, 12),
    }


def _message(rng: random.Random) -> Record:
    return {
        "sender": rng.choice(FIRST_NAMES),
        "recipient": rng.choice(FIRST_NAMES),
        "subject": f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}",
        "room": rng.randint(10, 999),
    }


DOMAINS: tuple[tuple[Callable[[random.Random], Record], tuple[str, ...]], ...] = (
    (_person, PERSON),
    (_order, ORDER),
    (_event, EVENT),
    (_message, MESSAGE),
)


def extraction(rng: random.Random, split: Split) -> Item:
    """Two to all of the fields of a person, an order, an event or a message, in the order asked for."""

    def propose() -> tuple[str, tuple[Record, str]]:
        make_record, sentences = rng.choice(DOMAINS)
        record = make_record(rng)
        return json.dumps(record), (record, rng.choice(sentences).format(**record))

    content, (record, sentence) = draw("extraction", split, propose)
    fields = rng.sample(list(record), rng.randint(2, len(record)))
    listed = ", ".join(fields[:-1]) + " and " + fields[-1] if rng.random() < 0.5 else ", ".join(fields)
    request = rng.choice(REQUESTS).format(fields=listed, sentence=sentence)
    answer = json.dumps({name: record[name] for name in fields})
    return Item("extraction", content, ({"role": "user", "content": request},), answer)
