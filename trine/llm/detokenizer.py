"""Token ids to text while they are generated: whole characters only, and stop strings.

`IncrementalDetokenizer` gives the text of a growing sequence piece by piece; the pieces' concatenation is what decoding
the whole sequence gives. `OutputText` looks for stop strings on top of it.
"""

from __future__ import annotations

import re
from codecs import utf_8_decode
from collections.abc import Callable, Sequence
from typing import Protocol

from trine.llm.token_table import REPLACEMENT, Plan, TokenTable, decode_run
from trine.llm.tokenizer import Tokenizer

MAX_HELD_BYTES = 128
MAX_HELD_TOKENS = 8
CONTEXT_TOKENS = 6


class _Stream(Protocol):
    def push(self, ids: Sequence[int]) -> str: ...
    def flush(self) -> str: ...


class IncrementalDetokenizer:
    """Text of generated tokens. `push(ids)` returns the text that they complete, `flush()` at the end what is left.

    The text continues the prompt: where a tokenizer drops the space at the start of a text (SentencePiece), it is kept
    after a prompt. Else the prompt has no effect, and the concatenation equals `tokenizer.decode` of all pushed ids.
    One exception: where invalid UTF-8 follows more than 128 bytes of valid characters in byte-fallback tokens (nothing
    else between them), the library turns all of those bytes into U+FFFD; here the characters that were given out stay.

    push: a function of token ids (any sequence of ints, empty too). About 0.4 µs a token for byte-level BPE.
    """

    __slots__ = ("flush", "push")

    push: Callable[[Sequence[int]], str]
    flush: Callable[[], str]

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        table = tokenizer.table
        skipped = table.special_ids if skip_special_tokens else frozenset[int]()
        at_start = all(index in skipped for index in prompt_token_ids)
        stream: _Stream
        if table.plan is None:
            stream = _WindowStream(tokenizer, prompt_token_ids, skip_special_tokens)
        elif table.plan.kind == "byte_level":
            stream = _ByteStream(table, skipped)
        else:
            stream = _PieceStream(table, table.plan, skipped, at_start)
        self.push = stream.push  # bound once: a call through this object costs no more than one to the stream
        self.flush = stream.flush


class _ByteStream:
    """Byte-level BPE: tokens are bytes, the text is their UTF-8."""

    __slots__ = ("_data", "_pending", "_skipped", "_texts")

    def __init__(self, table: TokenTable, skipped: frozenset[int]) -> None:
        self._texts = table.texts_without(skipped)
        self._data = table.data
        self._skipped = skipped
        self._pending = b""

    def push(self, ids: Sequence[int]) -> str:
        if not self._pending:
            try:
                return "".join([self._texts[index] for index in ids])  # type: ignore[misc]
            except (TypeError, IndexError):
                pass  # a token with a part of a character, or an id outside of the vocabulary
        data, skipped = self._data, self._skipped
        known = [data[index] for index in ids if index < len(data) and index not in skipped]
        pending = b"".join([self._pending, *known])
        text, used = utf_8_decode(pending, "replace", False)
        self._pending = pending[used:]
        return text

    def flush(self) -> str:
        text, _ = utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        return text


class _PieceStream:
    """Pieces of text, with byte-fallback tokens between them (SentencePiece), and rules at the start of the text.

    A run of byte tokens is text when all of it is UTF-8, so it is held until it ends, or is known to be invalid, or is
    long.
    """

    __slots__ = ("_at_start", "_invalid", "_plan", "_run", "_skipped", "_table", "_texts")

    def __init__(self, table: TokenTable, plan: Plan, skipped: frozenset[int], at_start: bool) -> None:
        self._table = table
        self._texts = table.texts_without(skipped)
        self._plan = plan
        self._skipped = skipped
        self._at_start = at_start and (plan.first is not None or plan.strip_leading_space)
        self._run = b""
        self._invalid = False  # the run is known not to be UTF-8: each of its bytes is U+FFFD

    def push(self, ids: Sequence[int]) -> str:
        if not (self._at_start or self._run or self._invalid):
            try:
                return "".join([self._texts[index] for index in ids])  # type: ignore[misc]
            except (TypeError, IndexError):
                pass
        return "".join([self._one(index) for index in ids])

    def _one(self, index: int) -> str:
        if index in self._skipped or index >= len(self._texts) or self._table.tokens[index] is None:
            return ""
        text = self._texts[index]
        if text is None:
            return self._byte(self._table.data[index])
        before = self._end_run()
        if self._at_start and self._plan.first is not None:
            self._at_start = False
            text = self._table.first_text(index, self._plan)
        return before + self._strip(text)

    def _byte(self, byte: bytes) -> str:
        if self._plan.first is not None:
            self._at_start = False
        if self._invalid:
            return REPLACEMENT
        self._run += byte
        try:
            text, used = utf_8_decode(self._run, "strict", False)
        except UnicodeDecodeError:
            self._invalid = True
            text, used = REPLACEMENT * len(self._run), len(self._run)
        else:
            if len(self._run) <= MAX_HELD_BYTES:
                return ""
        self._run = self._run[used:]
        return self._strip(text)

    def _end_run(self) -> str:
        text = decode_run(self._run)
        self._run = b""
        self._invalid = False
        return self._strip(text)

    def _strip(self, text: str) -> str:
        """Drops one space at the start of the whole text."""
        if not (self._at_start and text and self._plan.strip_leading_space):
            return text
        self._at_start = False
        return text.removeprefix(" ")

    def flush(self) -> str:
        return self._end_run()


class _WindowStream:
    """Any decoder: decodes the last tokens with and without the new ones, and takes the difference.

    Right when a token's text depends on a few tokens before it only. A text that ends in U+FFFD may be half a
    character: it is held for up to 8 tokens.
    """

    __slots__ = ("_held", "_ids", "_skip", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = list(prompt_token_ids[-CONTEXT_TOKENS:])
        self._held = 0  # how many of `_ids`, at the end, have not given text

    def push(self, ids: Sequence[int]) -> str:
        return "".join([self._one(index) for index in ids])

    def _one(self, index: int) -> str:
        self._ids.append(index)
        self._held += 1
        return self._take(self._held >= MAX_HELD_TOKENS)

    def _take(self, force: bool) -> str:
        before, text = self._decode(self._ids[: len(self._ids) - self._held]), self._decode(self._ids)
        if len(text) <= len(before) or (text.endswith(REPLACEMENT) and not force):
            return ""
        del self._ids[: max(0, len(self._ids) - max(CONTEXT_TOKENS, self._held))]
        self._held = 0
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def flush(self) -> str:
        return self._take(True) if self._held else ""


class OutputText:
    """A sequence's text, ended by a stop string.

    The stop string that is complete first in the text wins; of several that end at the same character, the longest. It
    is cut from the text, with all that follows, unless `include_stop`. Text that may still become a stop string is held
    back, no more.

    With `allow_stop=False`, stop strings that these tokens complete are text. One that they only begin counts when
    a later push completes it.
    """

    __slots__ = ("_begins", "_detokenizer", "_held", "_include_stop", "_stop", "stop_string")

    def __init__(self, detokenizer: IncrementalDetokenizer, stop: Sequence[str], include_stop: bool) -> None:
        self._detokenizer = detokenizer
        self._stop = tuple(dict.fromkeys(text for text in stop if text))
        self._include_stop = include_stop
        first_characters = "|".join(sorted({re.escape(text[0]) for text in self._stop}))
        self._begins = re.compile(first_characters).search if self._stop else None
        self._held = ""
        self.stop_string: str | None = None

    def push(self, ids: Sequence[int], allow_stop: bool = True) -> tuple[str, str | None]:
        """Text that is final with these tokens, and the stop string that ended it, if one did. Nothing follows a
        stop.
        """
        if self.stop_string is not None:
            return "", self.stop_string
        text = self._detokenizer.push(ids)
        if self._begins is None or not (self._held or self._begins(text)):
            return text, None
        return self._scan(text, allow_stop)

    def _scan(self, new: str, allow_stop: bool) -> tuple[str, str | None]:
        if not new:
            return "", None
        old = len(self._held)
        text = self._held + new
        if allow_stop and (match := self._first_match(text, old)):
            start, stop = match
            self._held = ""
            self.stop_string = stop
            return text[: start + len(stop) if self._include_stop else start], stop
        keep = self._prefix_length(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def _first_match(self, text: str, old: int) -> tuple[int, str] | None:
        """Start and string of the match with the smallest end beyond `old`, the longest among those."""
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            start = text.find(stop, max(0, old - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else best[1:]

    def _prefix_length(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with, but is not all of."""
        earliest = len(text)
        for stop in self._stop:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1), earliest)
            while start >= 0:
                if stop.startswith(text[start:]):
                    earliest = start
                    break
                start = text.find(stop[0], start + 1, earliest)
        return len(text) - earliest

    def flush(self) -> str:
        """The rest of the text, at its end. `stop_string` tells when the detokenizer's last characters complete one."""
        if self.stop_string is not None:
            return ""
        text, _ = self._scan(self._detokenizer.flush(), True) if self._stop else (self._detokenizer.flush(), None)
        text += self._held
        self._held = ""
        return text
