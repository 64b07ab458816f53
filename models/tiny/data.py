"""Rows of packed training documents, made while training goes on.

A row is [4, length] int16: token ids, what a token's loss counts (per cent), the number of the document in the row
(tokens attend to their own document only) and the category the document is of. Row streams are seeded: worker w of W
makes batches w, w + W, … and the loader hands them out in that order.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset, get_worker_info

from models.tiny.chat import Conversations, Segment, assistant, render, user
from trine.evaluation.items import SYSTEM_PROMPTS, Message
from trine.evaluation.lookup import LONGEST, SHORTEST, first_turn, make_table
from trine.evaluation.sequences import COPY
from trine.evaluation.tasks import SHORT_TASKS, make_item

PROSE_LOSS = 25
ANSWER_LOSS = 100
SHARED_TURNS = 0.25
"""Short items are asked one after the other in one conversation this often."""

LOOKUP_ROWS = 0.6
"""Rows that begin with a long lookup."""

FOLLOWING_QUESTIONS = (
    "And {key}?",
    "{key}?",
    "What is the value of {key}?",
    "Look up {key}.",
    "Give me the value of {key}.",
)

DOCUMENT_WEIGHTS = {
    "addition": 3.0,
    "subtraction": 4.5,
    "sorting": 4.0,
    "reversing": 2.0,
    "counting": 3.5,
    "copying": 2.0,
    "extraction": 2.0,
    "tool_calling": 1.2,
    "stopping": 1.5,
    "lookup": 0.5,
    "drill": 1.0,
    "chat": 3.0,
    "recital": 0.6,
    "prose": 1.4,
}
CATEGORIES = tuple(DOCUMENT_WEIGHTS)

CURRICULUM = 0.15
"""The part of training over which lookups grow from short to their full length."""


class Documents:
    """Draws training documents as segments of text."""

    def __init__(self, data: Path, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.prose = np.load(data / "prose.npy", mmap_mode="r")
        self.conversations = Conversations(json.loads((data / "definitions.json").read_text(encoding="utf-8")))

    def count_tokens(self, texts: list[str]) -> list[int]:
        return [len(encoding.ids) for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def draw(self, category: str, rng: random.Random) -> list[Segment]:
        """A short document of a category other than prose and lookup."""
        if category in SHORT_TASKS:
            return self.items(category, rng)
        if category == "drill":
            return self.drill(rng)
        if category == "recital":
            return self.recital(rng)
        return self.conversations.draw(rng)

    def items(self, category: str, rng: random.Random) -> list[Segment]:
        """One item of the category, or one and some others of any category after it."""
        item = make_item(category, rng, "train", self.count_tokens)
        messages = [*item.messages, assistant(item.answer)]
        if not item.tools and rng.random() < SHARED_TURNS:
            for other in rng.choices([task for task in SHORT_TASKS if task != "tool_calling"], k=rng.randint(1, 4)):
                turn = SHORT_TASKS[other](rng, "train")
                messages += [*turn.messages, assistant(turn.answer)]
        return render(messages, item.tools)

    def drill(self, rng: random.Random) -> list[Segment]:
        """Sums in a column: many answers in few tokens."""
        segments: list[Segment] = []
        for _ in range(rng.randint(8, 24)):
            task, sign = rng.choice((("addition", "+"), ("subtraction", "-"), ("subtraction", "-")))
            numbers = SHORT_TASKS[task](rng, "train")
            first, second = numbers.content.split(sign)
            if numbers.answer.startswith("-") or (task == "addition" and rng.random() < 0.5):
                first, second = second, first
            segments += [(f"{first}{sign}{second}=", False), (numbers.answer + "\n", True)]
        return segments

    def recital(self, rng: random.Random) -> list[Segment]:
        """Copying a passage of prose."""
        start = rng.randrange(len(self.prose) - 200)
        text = self.tokenizer.decode(self.prose[start : start + rng.randint(4, 90)].tolist()).strip()
        text = " ".join(text.replace("\ufffd", "").split()) or "nothing"
        messages = [user(rng.choice(COPY).format(text=text)), assistant(text)]
        if rng.random() < 0.5:
            messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        return render(messages)

    def lookups(self, rng: random.Random, budget: int, questions: int) -> list[Segment]:
        """A list and several questions on it, one turn each."""
        table = make_table(rng, "train", budget, self.count_tokens)
        asked = rng.sample(table.pairs, min(questions, len(table.pairs)))
        messages: list[Message] = [*first_turn(rng, table, asked[0][0]), assistant(asked[0][1])]
        for key, value in asked[1:]:
            messages += [user(rng.choice(FOLLOWING_QUESTIONS).format(key=key)), assistant(value)]
        return render(messages)


class Row:
    """A row that is being filled."""

    def __init__(self, length: int) -> None:
        self.array = np.zeros((4, length), dtype=np.int16)
        self.used = 0
        self.documents = 0

    @property
    def room(self) -> int:
        return self.array.shape[1] - self.used

    def add(self, ids: np.ndarray, losses: np.ndarray, category: str) -> None:
        """Append a document, cut to the room there is."""
        size = min(len(ids), self.room)
        columns = slice(self.used, self.used + size)
        self.array[0, columns] = ids[:size]
        self.array[1, columns] = losses[:size]
        self.array[2, columns] = self.documents
        self.array[3, columns] = CATEGORIES.index(category)
        self.used += size
        self.documents += 1


class Rows:
    """Fills rows: at most one long lookup first, then short documents, then prose to the end."""

    def __init__(self, documents: Documents, length: int, rng: random.Random) -> None:
        self.documents = documents
        self.length = length
        self.rng = rng
        self.waiting: list[tuple[np.ndarray, np.ndarray, str]] = []

    def encode(self, segments: list[Segment]) -> tuple[np.ndarray, np.ndarray]:
        encodings = self.documents.tokenizer.encode_batch_fast([text for text, _ in segments], add_special_tokens=False)
        pieces = [encoding.ids for encoding in encodings]
        losses = [
            np.full(len(ids), ANSWER_LOSS if answer else 0, np.int16)
            for ids, (_, answer) in zip(pieces, segments, strict=True)
        ]
        return np.concatenate([np.array(ids, dtype=np.int16) for ids in pieces if ids]), np.concatenate(losses)

    def add_prose(self, row: Row, size: int) -> None:
        start = self.rng.randrange(len(self.documents.prose) - size)
        ids = np.asarray(self.documents.prose[start : start + size]).astype(np.int16)
        row.add(ids, np.full(size, PROSE_LOSS, np.int16), "prose")

    def add_lookup(self, row: Row, progress: float, longest: int) -> None:
        """A lookup of up to `longest` tokens, questions included."""
        questions = self.rng.randint(6, 24)
        limit = min(LONGEST, longest - 24 * questions - 60)
        limit = min(limit, SHORTEST + round((LONGEST - SHORTEST) * max(0.06, progress / CURRICULUM)))
        if limit <= SHORTEST:
            return
        if self.rng.random() < 0.5:
            budget = round(SHORTEST * (limit / SHORTEST) ** self.rng.random())
        else:
            budget = self.rng.randint(SHORTEST, limit)
        row.add(*self.encode(self.documents.lookups(self.rng, budget, questions)), "lookup")

    def make(self, progress: float) -> np.ndarray:
        """A row for a time in training from 0 to 1."""
        row = Row(self.length)
        if self.rng.random() < LOOKUP_ROWS:
            self.add_lookup(row, progress, self.length)
        while True:
            if self.waiting:
                ids, losses, category = self.waiting.pop()
            else:
                category = self.rng.choices(CATEGORIES, list(DOCUMENT_WEIGHTS.values()))[0]
                if category == "prose":
                    self.add_prose(row, min(row.room, self.rng.randint(32, 400)))
                    continue
                if category == "lookup":
                    self.add_lookup(row, progress, min(row.room, 1200))
                    continue
                ids, losses = self.encode(self.documents.draw(category, self.rng))
            if len(ids) > row.room:
                if len(ids) <= self.length:
                    self.waiting.append((ids, losses, category))
                break
            row.add(ids, losses, category)
        if row.room:
            self.add_prose(row, row.room)
        return row.array


class Batches(IterableDataset[torch.Tensor]):
    """Batches [rows, 4, length] int16, `steps` of them over all workers."""

    def __init__(self, data: Path, model: Path, rows: int, length: int, steps: int, seed: int, first: int = 0) -> None:
        self.data, self.model, self.rows, self.length = data, model, rows, length
        self.steps, self.seed, self.first = steps, seed, first

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        tokenizer = Tokenizer.from_file(str(self.model / "tokenizer.json"))
        rng = random.Random(f"{self.seed}/{self.first}/{worker}/{workers}")
        rows = Rows(Documents(self.data, tokenizer), self.length, rng)
        for step in range(self.first + worker, self.steps, workers):
            make = partial(rows.make, step / self.steps)
            yield torch.from_numpy(np.stack([make() for _ in range(self.rows)]))
