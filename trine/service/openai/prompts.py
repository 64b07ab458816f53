"""Prompts as the wire gives them: texts or token ids, one or many."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trine.core.errors import RequestError

if TYPE_CHECKING:
    from trine.llm.tokenizer import Tokenizer

LONG_TEXT = 16_384
"""Characters from which a text is tokenised in a thread, so that other requests' streams go on (about 2 ms)."""

WirePrompts = str | Sequence[str | int | Sequence[int]]
Prompts = list[str] | list[list[int]]


def split_prompts(value: WirePrompts, name: str) -> Prompts:
    """Texts, or lists of token ids. `name` is the field's, for errors."""
    if isinstance(value, str):
        return [value]
    if not value:
        raise RequestError(f"{name} is empty: give a text or token ids", param=name)
    texts = [item for item in value if isinstance(item, str)]
    if len(texts) == len(value):
        return texts
    numbers = [item for item in value if isinstance(item, int)]
    if len(numbers) == len(value):
        return [numbers]
    lists = [list(item) for item in value if not isinstance(item, str | int)]
    if len(lists) == len(value):
        return lists
    raise RequestError(f"{name} mixes texts and token ids: give texts only, or token ids only", param=name)


async def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids; a long text leaves the event loop free meanwhile."""
    if len(text) < LONG_TEXT:
        return tokenizer.encode(text, add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)


def truncate(token_ids: list[int], limit: int | None, max_model_len: int) -> list[int]:
    """The last `limit` tokens; -1 keeps as many as the model's context holds, with room for one more."""
    if limit is None:
        return token_ids
    if limit < -1 or limit == 0:
        raise RequestError(
            f"truncate_prompt_tokens={limit}: give the number of tokens to keep, or -1 for as many as fit",
            param="truncate_prompt_tokens",
        )
    return token_ids[-(max_model_len - 1 if limit == -1 else limit) :]
