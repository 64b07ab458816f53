"""Log-probabilities in the shapes of chat and of plain completions."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trine.llm.outputs import Logprob, TokenLogprobs
from trine.service.openai.structs.chat import ChoiceLogprobs, TokenLogprob, TopLogprob
from trine.service.openai.structs.completions import CompletionLogprobs

if TYPE_CHECKING:
    from trine.llm.tokenizer import Tokenizer

LOWEST = -9999.0
"""Stands for the logarithm of zero, which JSON has no number for."""


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], num_top: int
) -> ChoiceLogprobs:
    """The tokens of one choice, each with its `num_top` most probable alternatives (itself among them)."""
    content = []
    for token_id, entry in zip(token_ids, logprobs, strict=True):
        chosen = entry[token_id]
        top = [
            TopLogprob(token=other.token, logprob=finite(other.logprob), bytes=list(tokenizer.token_bytes(other_id)))
            for other_id, other in most_probable(entry, num_top)
        ]
        content.append(
            TokenLogprob(
                token=chosen.token,
                logprob=finite(chosen.logprob),
                bytes=list(tokenizer.token_bytes(token_id)),
                top_logprobs=top,
            )
        )
    return ChoiceLogprobs(content=content)


class CompletionLogprobsBuilder:
    """Log-probabilities of one choice of /v1/completions, with the place of each token in the choice's text."""

    def __init__(self, tokenizer: Tokenizer, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def build(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> CompletionLogprobs:
        """The next tokens. None stands for the prompt's first token, which nothing predicts."""
        result = CompletionLogprobs(
            tokens=[], token_logprobs=[], top_logprobs=[] if self._num_top else None, text_offset=[]
        )
        for token_id, entry in zip(token_ids, logprobs, strict=True):
            result.tokens.append(self._tokenizer.token_text(token_id) if entry is None else entry[token_id].token)
            result.token_logprobs.append(None if entry is None else finite(entry[token_id].logprob))
            if result.top_logprobs is not None:
                result.top_logprobs.append(None if entry is None else self._top(token_id, entry))
            result.text_offset.append(self._offset)
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return result

    def _top(self, token_id: int, entry: TokenLogprobs) -> dict[str, float]:
        """By text: of tokens that look alike (parts of characters), the more probable one counts."""
        top: dict[str, float] = {}
        for _, other in [*most_probable(entry, self._num_top), (token_id, entry[token_id])]:
            top.setdefault(other.token, finite(other.logprob))
        return top


def most_probable(entry: TokenLogprobs, count: int) -> list[tuple[int, Logprob]]:
    """The `count` best by rank, best first."""
    ranked = sorted(entry.items(), key=lambda item: item[1].rank)
    return [item for item in ranked if item[1].rank <= count]


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)
