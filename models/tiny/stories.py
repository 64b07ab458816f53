"""Longer answers for `tiny` to learn: stories, verses, lists and made-up records, put together at random."""

from __future__ import annotations

import json
import random

from trine.evaluation.extraction import DOMAINS
from trine.evaluation.words import ADJECTIVES, CITIES, COLORS, FIRST_NAMES, JOBS, NOUNS, words_of

ANIMALS = words_of("""
    otter falcon tiger rabbit horse donkey sheep goat cow pig dog cat mouse squirrel beaver badger fox wolf bear deer
    moose eagle owl robin sparrow raven crow swan goose duck turtle lizard snake frog salmon whale dolphin crab spider
    """)
FRUITS = words_of("lemon orange apple banana cherry grape melon peach plum pear mango olive")
VEGETABLES = words_of("tomato potato carrot onion garlic cabbage lettuce spinach bean pea corn")
THINGS = words_of(
    "lantern violin candle mirror blanket hammer ladder bottle kettle compass feather clock map bell ring"
)
PLACES = (
    "by a quiet river", "at the edge of the forest", "in a small village", "near the old bridge", "on a green hill",
    "behind the castle", "in the garden of a school", "beside a deep lake", "under a maple tree", "on a little island",
)  # fmt: skip
NAMES_OF_KINDS = {
    "animals": ANIMALS,
    "fruits": FRUITS,
    "vegetables": VEGETABLES,
    "colors": COLORS,
    "cities": CITIES,
    "jobs": JOBS,
    "names": FIRST_NAMES,
}
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven")

STORY_REQUESTS = (
    "Tell me a story about {subject}.", "Write a story about {subject}.", "Write a short story about {subject}.",
    "Can you tell me a story about {subject}?", "I want a story about {subject}.", "Tell a tale of {subject}.",
)  # fmt: skip
LONG_REQUESTS = ("Write a long story about {subject}.", "Tell me a long story about {subject}.")
FREE_REQUESTS = ("Tell me a story.", "Write a story.", "Write something.", "Tell me a tale.", "Write a few sentences.")
POEM_REQUESTS = (
    "Write a poem about {subject}.", "Write a short poem about {subject}.", "Can you write a poem about {subject}?",
    "Write a verse about {subject}.",
)  # fmt: skip

OPENINGS = (
    "Once there was {subject} called {name}.", "{name} was {subject} who lived {place}.",
    "Long ago, {subject} lived {place}. Its name was {name}.", "This is the story of {name}, {subject} from {city}.",
)  # fmt: skip
EVENTS = (
    "One day {name} found {thing} {place}.",
    "In the morning {name} walked to the market and bought a {food}.",
    "The next day it rained, and {name} stayed at home and drank tea.",
    "On the way {name} met {other}, who was looking for {thing}.",
    '"Where are you going?" asked {friend}. "I am going to {city}," said {name}.',
    '"Have you seen my {object}?" asked {friend}. {name} had not seen it.',
    "They shared a {food} and talked until the evening.",
    "{name} sat down {place} and looked at the stars.",
    "At night the wind was loud, and nobody could sleep.",
    "{friend} brought {thing}, and everybody was happy.",
    "Then {name} heard a sound. It was only {other}.",
    "They looked for the {object} in the kitchen, in the cellar and in the garden.",
    "At last the {object} lay {place}.",
    "{name} was tired, but went on.",
    "{friend} laughed and said that a {food} is better than a {object}.",
    "So {name} wrote a letter to {friend} and waited for an answer.",
    "The answer came in the winter, from {city}.",
    "{name} thought about it for a long time.",
)
ENDINGS = (
    "From that day on they were friends.", "In the end {name} went home and slept.", "And that was the end of it.",
    "{name} never forgot that day.", "When the sun came up, {name} was home again.",
)  # fmt: skip
COUPLETS = (
    "The river runs, the stars are bright,\nthe {noun} waits through all the night.",
    "The wind is cold, the hills are steep,\nthe {noun} has gone to sleep.",
    "The morning comes, the sky is clear,\nthe {noun} is always here.",
    "The rain falls softly on the stone,\nthe {noun} is not alone.",
    "The boats come home across the bay,\nthe {noun} will not go away.",
    "The leaves are red, the year is old,\nthe {noun} is worth more than gold.",
    "The bells are ringing in the town,\nthe {noun} wears a silver crown.",
    "The snow lies deep on field and tree,\nthe {noun} sings a song for me.",
)

UNKNOWN_ANSWERS = (
    "I do not know that. I am a small model.",
    "I am sorry, I do not know.",
    "I do not know. I am only a small language model.",
)
UNKNOWN_QUESTIONS = (
    "Why is the {noun} so {adjective}?", "Who invented the {noun}?", "How do I build a {noun}?",
    "When was {city} founded?",
    "What do you think about {city}?", "How does a {noun} work?", "Why do people like a {adjective} {noun}?",
    "How many people live in {city}?", "Who is the best {job} in {city}?", "What is your opinion on {noun}s?",
    "Can you explain why the {noun} is {adjective}?", "How much does a {noun} cost?",
    "What happened in {city} last year?",
    "How can I become a {job}?", "Why is the sky {adjective}?", "Please help me with my {noun}.",
    "{noun}", "{adjective} {noun}",
)  # fmt: skip


def article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _subject(rng: random.Random) -> str:
    kind = rng.choice((*ANIMALS, *JOBS))
    return article(kind if rng.random() < 0.5 else f"{rng.choice(ADJECTIVES)} {kind}")


def story(rng: random.Random, subject: str, events: int) -> str:
    """A tale of a named character, with as many events as asked for between the opening and the end."""
    name, friend = rng.sample(FIRST_NAMES, 2)
    thing = rng.choice(THINGS)

    def fill(template: str) -> str:
        return template.format(
            subject=subject,
            name=name,
            friend=friend,
            thing=article(f"{rng.choice(ADJECTIVES)} {thing}"),
            object=thing,
            other=article(rng.choice(ANIMALS)),
            food=rng.choice(FRUITS),
            city=rng.choice(CITIES),
            place=rng.choice(PLACES),
        )

    chosen = rng.sample(EVENTS, events)
    return " ".join(fill(template) for template in (rng.choice(OPENINGS), *chosen, rng.choice(ENDINGS)))


def written(rng: random.Random) -> tuple[str, str]:
    """A request for a text, and the text."""
    kind = rng.random()
    if kind < 0.25:
        noun = rng.choice(NOUNS)
        subject = rng.choice((f"the {noun}", article(noun), noun))
        verses = [couplet.format(noun=noun) for couplet in rng.sample(COUPLETS, rng.randint(1, 4))]
        return rng.choice(POEM_REQUESTS).format(subject=subject), "\n".join(verses)
    subject = _subject(rng)
    if kind < 0.4:
        return rng.choice(FREE_REQUESTS), story(rng, subject, rng.randint(3, 8))
    if kind < 0.6:
        return rng.choice(LONG_REQUESTS).format(subject=subject), story(rng, subject, rng.randint(10, len(EVENTS)))
    return rng.choice(STORY_REQUESTS).format(subject=subject), story(rng, subject, rng.randint(3, 8))


def listed(rng: random.Random) -> tuple[str, str]:
    """So many things of a kind, or a made-up record as JSON."""
    if rng.random() < 0.35:
        record = rng.choice(DOMAINS)[0](rng)
        fields = rng.sample(list(record), rng.randint(2, len(record)))
        names = ", ".join(fields[:-1]) + " and " + fields[-1]
        asked = rng.choice(
            ("Make up a JSON object with {names}.", "Give me a JSON object with {names}.", "JSON with {names}, please.")
        )
        return asked.format(names=names), json.dumps({name: record[name] for name in fields})
    kind = rng.choice(list(NAMES_OF_KINDS))
    count = rng.randint(2, 6)
    number = rng.choice((NUMBERS[count - 1], str(count)))
    asked = rng.choice(
        ("Name {number} {kind}.", "List {number} {kind}.", "Give me {number} {kind}.", "Tell me {number} {kind}.")
    )
    return asked.format(number=number, kind=kind), ", ".join(rng.sample(NAMES_OF_KINDS[kind], count))


def unknown(rng: random.Random) -> tuple[str, str]:
    """A question that is beyond the model, and an honest answer."""
    if rng.random() < 0.2:
        letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))
        return letters, rng.choice(UNKNOWN_ANSWERS)
    asked = rng.choice(UNKNOWN_QUESTIONS).format(
        noun=rng.choice(NOUNS), adjective=rng.choice(ADJECTIVES), city=rng.choice(CITIES), job=rng.choice(JOBS)
    )
    return asked, rng.choice(UNKNOWN_ANSWERS)
