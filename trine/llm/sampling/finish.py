"""The end of a JSON text from where it stands, in few tokens: what to write when the budget runs out.

A model can write strings, arrays and nested values without end, and a text that is cut off is no JSON. So a guided
sequence knows, from time to time, a way to its end; when the tokens that are left are hardly more than that, it
takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trine.llm.sampling.json_text import JsonText, Place

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_TOKENS = 4096
_MAX_SEARCHES = 256
# What to write first where there is a choice: close, then go on to what must follow, then the shortest values.
_STRUCTURE = tuple(bytes([byte]) for byte in b']},:"0123456789[tfn{-.')


class Finisher:
    """Finds ends for one vocabulary. `tokens` [V]: the bytes of each token; special ones must not be found by bytes."""

    def __init__(self, tokens: Sequence[bytes], special_ids: Sequence[int], eos_token_ids: Sequence[int]) -> None:
        self._tokens = tokens
        self._eos_token_ids = list(eos_token_ids)
        special = set(special_ids)
        self._bytes: dict[bytes, int] = {}
        for index, token in enumerate(tokens):
            if len(token) == 1 and index not in special:
                self._bytes.setdefault(token, index)
        self._structure = [self._bytes[char] for char in _STRUCTURE if char in self._bytes]
        self._quote = self._bytes.get(b'"', -1)

    def find(self, matcher: LLMatcher, text: JsonText, limit: int = MAX_TOKENS) -> list[int] | None:
        """Tokens that complete the text, end-of-sequence left out; None if none were found within `limit`."""
        matcher, text = matcher.deep_copy(), text.copy()
        path: list[int] = []
        searches = 0
        seen: set[bytes] = set()
        while len(path) < limit:
            allowed = self._allowed(matcher)
            if matcher.is_stopped() or allowed[self._eos_token_ids].any():
                return path
            token = self._obvious(allowed, text)
            if token is None:
                searches += 1
                token = self._search(matcher, text, allowed, seen) if searches <= _MAX_SEARCHES else None
                if token is None:
                    return None
            elif text.place is Place.STRUCTURE:
                seen.clear()
            path.append(token)
            if not matcher.consume_token(token):
                return None
            text.feed(self._tokens[token])
        return None

    def _allowed(self, matcher: LLMatcher) -> npt.NDArray[np.bool_]:
        return np.unpackbits(self._mask(matcher), count=len(self._tokens), bitorder="little").view(np.bool_)

    def _mask(self, matcher: LLMatcher) -> npt.NDArray[np.uint8]:
        mask = np.zeros(-(-len(self._tokens) // 32) * 4, dtype=np.uint8)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return mask

    def _obvious(self, allowed: npt.NDArray[np.bool_], text: JsonText) -> int | None:
        """The token to write where that needs no search."""
        only = np.flatnonzero(allowed)
        if len(only) == 1:
            return int(only[0])
        if text.place is Place.STRING:
            return self._quote if allowed[self._quote] else None
        if text.place is Place.ESCAPE:
            return None
        first = next((token for token in self._structure if allowed[token]), None)
        in_number = text.place is not Place.STRUCTURE
        return None if in_number and first is not None and self._tokens[first] not in (b"]", b"}", b",") else first

    def _search(
        self, matcher: LLMatcher, text: JsonText, allowed: npt.NDArray[np.bool_], seen: set[bytes]
    ) -> int | None:
        """A byte that ends the string or number, or leads where the text has not been (`seen`), or else any."""
        seen.add(allowed.tobytes())
        ways: list[tuple[bool, int]] = []
        for token in self._bytes.values():
            if not allowed[token]:
                continue
            ahead, text_ahead = matcher.deep_copy(), text.copy()
            if not ahead.consume_token(token) or not text_ahead.feed(self._tokens[token]):
                continue
            then = self._allowed(ahead)
            if ahead.is_stopped() or then[self._eos_token_ids].any() or self._ends(then, text_ahead):
                return token
            ways.append((then.tobytes() in seen, token))
        return min(ways)[1] if ways else None

    def _ends(self, allowed: npt.NDArray[np.bool_], text: JsonText) -> bool:
        if text.place is Place.STRING:
            return bool(allowed[self._quote])
        closers = [self._bytes[char] for char in (b"]", b"}", b",") if char in self._bytes]
        return text.place is not Place.ESCAPE and bool(allowed[closers].any())
