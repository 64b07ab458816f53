"""Guided decoding: the tokens that keep an output within a JSON schema, a regular expression or a grammar.

Compiling and matching is the work of the llguidance library, which is imported when the first guided request comes.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from trine.core.errors import RequestError
from trine.llm.sampling.finish import Finisher
from trine.llm.sampling.gbnf import gbnf_to_lark, is_gbnf
from trine.llm.sampling.json_text import JsonText, NumberLimits
from trine.llm.sampling.params import GuidedParams
from trine.llm.sampling.schema import prepare_schema

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from trine.llm.tokenizer import Tokenizer

_CACHE_SIZE = 256
# One space, or a new line and its indentation: what models write, and never an endless run of blanks.
_WHITESPACE = r" |\n(?: {0,16}|\t{0,8})"


class Grammar:
    """A compiled grammar; states of it are made by `GrammarCompiler.new_state`."""

    def __init__(self, matcher: LLMatcher, vocabulary: _Vocabulary, holds_json: bool) -> None:
        self.matcher = matcher
        self.vocabulary = vocabulary
        self.holds_json = holds_json
        end = vocabulary.finisher.find(matcher, JsonText()) if holds_json else None
        self.shortest = None if end is None else len(end)


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Safe to call from several threads; the 256 last grammars are kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._library: tuple[LLTokenizer, _Vocabulary] | None = None
        self._cache: OrderedDict[tuple[str, str], Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, guided: GuidedParams) -> Grammar:
        """The grammar of `guided`. Raises RequestError when it is malformed, contradictory or can't be enforced.

        A few milliseconds for a schema, once; the first call also makes the library's view of the vocabulary, about a
        second for 150,000 tokens.
        """
        key = _cache_key(guided)
        with self._lock:
            grammar = self._cache.get(key)
            if grammar is None:
                grammar = self._compile(guided)
                self._cache[key] = grammar
                while len(self._cache) > _CACHE_SIZE:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(key)
        return grammar

    def new_state(self, grammar: Grammar) -> GrammarState:
        """The state of a sequence that has no output yet."""
        return GrammarState(grammar)

    def _compile(self, guided: GuidedParams) -> Grammar:
        from llguidance import LLMatcher

        if self._library is None:
            self._library = _make_library_tokenizer(self._tokenizer)
        library_tokenizer, vocabulary = self._library
        matcher = LLMatcher(library_tokenizer, _library_grammar(guided), log_level=0)
        if matcher.is_error():
            raise RequestError(f"{_describe(guided)}: {_one_line(matcher.get_error())}", param="guided")
        holds_json = guided.json is not None or guided.json_object or "%json" in (guided.grammar or "")
        return Grammar(matcher, vocabulary, holds_json)


class GrammarState:
    """How far one sequence's output has come in its grammar."""

    def __init__(self, grammar: Grammar) -> None:
        self._matcher = grammar.matcher.deep_copy()
        self._vocabulary = grammar.vocabulary
        self._shortest = grammar.shortest
        self._mask: npt.NDArray[np.int32] = np.zeros(-(-len(grammar.vocabulary.tokens) // 32), dtype=np.int32)
        self._mask_address = self._mask.ctypes.data
        self._text = JsonText() if grammar.holds_json else None
        self._end: list[int] = []  # tokens still to write on the way to the end, last first
        self._next_check: int | None = None

    def fill_mask(self, bitmask_row: torch.Tensor, remaining: int | None = None) -> None:
        """Set the bits of the tokens that may come next. bitmask_row [W] int32 on the host, contiguous.

        remaining: how many tokens the output may still get, this one included. When hardly more are left than it
        takes to complete a JSON text, only the tokens on that way are allowed. Ids beyond the tokenizer's vocabulary
        (padding of the model's) are not allowed. Nothing is allowed once the grammar became too complex to follow, or
        a token was accepted that it does not allow.
        """
        row = bitmask_row.numpy()
        if self._matcher.is_error():
            row[:] = 0
            return
        if remaining is not None and self._text is not None and not self._end and not self._matcher.is_stopped():
            self._mind_budget(self._text, remaining)
        if self._end:
            self._mask[:] = 0
            self._mask[self._end[-1] // 32] = np.left_shift(np.int32(1), self._end[-1] % 32)
        else:
            self._matcher.unsafe_compute_mask_ptr(self._mask_address, self._mask.nbytes)
            self._limit_numbers()
        words = min(len(row), len(self._mask))
        row[:words] = self._mask[:words]
        row[words:] = 0

    def accept(self, token_id: int) -> bool:
        """Go on by one token; False if the grammar does not allow it."""
        if self._end and self._end.pop() != token_id:
            self._end.clear()
        if self._text is not None and 0 <= token_id < len(self._vocabulary.tokens):
            self._text.feed(self._vocabulary.tokens[token_id])
        return self._matcher.consume_token(token_id)

    def is_finished(self) -> bool:
        """Whether the output is complete and only an end-of-sequence token may follow."""
        return self._matcher.is_stopped() and self._matcher.is_accepting()

    def _limit_numbers(self) -> None:
        """Forbid what makes a number too long, unless the grammar allows nothing else."""
        limits = None if self._text is None else self._vocabulary.number_limits.mask(self._text)
        if limits is not None:
            limited = self._mask & limits
            if limited.any():
                self._mask[:] = limited

    def _mind_budget(self, text: JsonText, remaining: int) -> None:
        """Look for the end when that may have become urgent, and take it if it has.

        The more there is to spare, the rarer the look: tokens bring the end further away by about one each, so the next
        look is due when a quarter is gone. A margin is kept for the token that opens an object with much to fill in.
        """
        if self._next_check is None:
            self._next_check = max(remaining // 2, 2 * (self._shortest or 0) + 16)
        if self._shortest is None or remaining > self._next_check:
            return
        end = self._vocabulary.finisher.find(self._matcher, text)
        if end is None:
            self._next_check = remaining * 3 // 4
            return
        spare = remaining - len(end)
        margin = 8 + min(self._shortest, 24)
        if spare <= margin:
            self._end = end[::-1]
        self._next_check = remaining - (spare // 4 if spare > 2 * margin else 1)


class _Vocabulary:
    """The tokenizer as llguidance wants to see it."""

    is_tokenizer_wrapper = True
    bos_token_id: int | None = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_ids[0]
        self.special_token_ids = sorted(tokenizer.special_ids | set(tokenizer.eos_token_ids))
        self.tokens: Sequence[bytes] = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]
        self.number_limits = NumberLimits(self.tokens)
        self.finisher = Finisher(self.tokens, self.special_token_ids, tokenizer.eos_token_ids)
        self._ids = {text: index for index, text in enumerate(self.tokens) if index not in self.special_token_ids}

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokens of a text that the grammar forces, so that the mask follows the model's own way to write it.

        SentencePiece's tokenizers put a space before a text, which is not in the grammar: tokens are used only when
        they spell the text.
        """
        data = text if isinstance(text, bytes) else text.encode()
        for lead in (b"", b"\n"):
            ids = self._tokenizer.encode((lead + data).decode("utf-8", "replace"), add_special_tokens=False)
            for start in range(len(lead) * 2 + 1):
                if b"".join(self.tokens[token] for token in ids[start:]) == data:
                    return ids[start:]
        return self._longest_tokens(data)

    def _longest_tokens(self, data: bytes) -> list[int]:
        """Tokens of bytes that the tokenizer can't spell alone: the longest that fits, again and again."""
        ids: list[int] = []
        while data:
            size = next((size for size in range(min(len(data), 32), 0, -1) if data[:size] in self._ids), 0)
            if size == 0:
                break
            ids.append(self._ids[data[:size]])
            data = data[size:]
        return ids


def _make_library_tokenizer(tokenizer: Tokenizer) -> tuple[LLTokenizer, _Vocabulary]:
    from llguidance import LLTokenizer

    if not tokenizer.eos_token_ids:
        raise RequestError(
            "guided decoding needs a tokenizer with an end-of-sequence token; this model's has none", param="guided"
        )
    vocabulary = _Vocabulary(tokenizer)
    library_tokenizer = LLTokenizer(
        vocabulary,  # type: ignore[arg-type]
        n_vocab=tokenizer.vocab_size,
        eos_token=list(tokenizer.eos_token_ids),
    )
    return library_tokenizer, vocabulary


def _cache_key(guided: GuidedParams) -> tuple[str, str]:
    if guided.json is not None:
        return "json", guided.json if isinstance(guided.json, str) else json.dumps(guided.json)
    if guided.json_object:
        return "json_object", ""
    if guided.regex is not None:
        return "regex", guided.regex
    if guided.choice is not None:
        return "choice", json.dumps(guided.choice)
    return "grammar", guided.grammar or ""


def _library_grammar(guided: GuidedParams) -> str:
    """The grammar in one of llguidance's input formats."""
    from llguidance import LLMatcher

    if guided.json is not None or guided.json_object:
        schema = {"type": "object"} if guided.json is None else prepare_schema(guided.json)
        options = {"whitespace_pattern": _WHITESPACE, "lenient": False, "coerce_one_of": False}
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)  # type: ignore[arg-type]
    if guided.regex is not None:
        return LLMatcher.grammar_from_regex(guided.regex)
    if guided.choice is not None:
        return LLMatcher.grammar_from_regex("|".join(f"(?:{_escape(text)})" for text in guided.choice))
    grammar = guided.grammar or ""
    return LLMatcher.grammar_from_lark(gbnf_to_lark(grammar) if is_gbnf(grammar) else _with_start(grammar))


def _escape(text: str) -> str:
    """A regular expression (Rust's syntax) that matches `text` only."""
    return "".join("\\" + char if char in r"\.+*?()|[]{}^$#&-~/" else char for char in text)


def _with_start(lark: str) -> str:
    """A Lark grammar whose start rule may be called root."""
    names = {line.split(":")[0].strip() for line in lark.splitlines() if ":" in line}
    return f"start: root\n{lark}" if "root" in names and "start" not in names else lark


def _describe(guided: GuidedParams) -> str:
    if guided.json is not None:
        return "JSON schema can't be enforced"
    if guided.regex is not None:
        return f"regex {guided.regex[:200]!r} can't be used"
    return "guided choice can't be used" if guided.choice is not None else "grammar can't be used"


def _one_line(message: str) -> str:
    """The library's message without the pictures of the grammar's text, on one line."""
    message = message.split("<state>")[0]
    if "\nerror: " in message:
        message = message.split("\nerror: ")[1]
    lines = [line for line in message.splitlines() if not re.match(r"\s*(\d+ \||\^)", line)]
    return " ".join(" ".join(lines).split())[:300]
