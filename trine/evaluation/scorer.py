"""Scoring a model on held-out items: the share of exact answers of each task."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from trine.core.errors import ConfigurationError
from trine.evaluation.items import Item
from trine.evaluation.tasks import TASKS, make_items

if TYPE_CHECKING:
    from trine.llm.api import LLM
    from trine.llm.tokenizer import Tokenizer

NUM_ITEMS = 200
LONG_ITEM_SHARE = 0.25
"""Of the costly items, of 3,500 tokens each, this share of the number is scored."""

ANSWER_TOKENS = 192
"""More than any right answer is long."""

Progress = Callable[[str, int, int], None]
"""Called with the task, the items of it done and the items of it in all."""


def parse_tool_call(text: str) -> dict[str, Any] | None:
    """The one call in a turn that is nothing but `<tool_call>{…}</tool_call>`, else None."""
    text = text.strip()
    if not (text.startswith("<tool_call>") and text.endswith("</tool_call>")):
        return None
    return parse_object(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object that the text is, else None."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _same(left: object, right: object) -> bool:
    """Equality that holds 1, 1.0 and true apart, as JSON does."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def is_right(item: Item, text: str, stopped: bool) -> bool:
    """Whether the turn is the item's answer and ended by itself.

    JSON is compared as a value (the order of its keys is free), everything else as text, to the character.
    """
    if not stopped:
        return False
    if item.task == "extraction":
        return _same(parse_object(text), parse_object(item.answer))
    if item.task == "tool_calling":
        return _same(parse_tool_call(text), parse_tool_call(item.answer))
    return text == item.answer


def num_items_of(task: str, num_items: int) -> int:
    return max(1, round(num_items * LONG_ITEM_SHARE)) if task == "lookup_3500" else num_items


def evaluate(
    llm: LLM,
    num_items: int = NUM_ITEMS,
    tasks: Sequence[str] | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Share of exact answers of each task, over `num_items` held-out items each (a quarter of it for lookup_3500).

    Answers are greedy. Raises ConfigurationError for a task that is not there.
    """
    chosen = tuple(TASKS if tasks is None else tasks)
    for task in chosen:
        if task not in TASKS:
            raise ConfigurationError(
                f"tasks: there is no task {task!r}; the tasks are {', '.join(TASKS)}", param="tasks"
            )
    return {task: _score(llm, task, num_items_of(task, num_items), seed, progress) for task in chosen}


def _score(llm: LLM, task: str, count: int, seed: int, progress: Progress | None) -> float:
    from trine.llm.sampling.params import SamplingParams

    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise ConfigurationError("model: it has no tokenizer, and tasks are text; give a directory with tokenizer.json")

    def count_tokens(texts: list[str]) -> list[int]:
        return [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]

    items = make_items(task, seed, count, "heldout", count_tokens)
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS)
    right = 0
    chunk = 8 if task == "lookup_3500" else 50
    for start in range(0, count, chunk):
        batch = items[start : start + chunk]
        outputs = llm.generate([{"prompt_token_ids": _prompt(tokenizer, item)} for item in batch], params)
        for item, output in zip(batch, outputs, strict=True):
            answer = output.outputs[0]
            right += is_right(item, answer.text, stopped=answer.finish_reason == "stop")
        if progress is not None:
            progress(task, min(start + chunk, count), count)
    return right / count


def _prompt(tokenizer: Tokenizer, item: Item) -> list[int]:
    text = tokenizer.render_chat(list(item.messages), tools=list(item.tools) or None, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)
