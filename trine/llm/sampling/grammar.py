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
from trine.llm.sampling.gbnf import gbnf_to_lark, is_gbnf
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

    def __init__(self, matcher: LLMatcher, is_json: bool) -> None:
        self.matcher = matcher
        self.is_json = is_json


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Safe to call from several threads; the 256 last grammars are kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._library_tokenizer: LLTokenizer | None = None
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
        return GrammarState(grammar, self._tokenizer.vocab_size)

    def _compile(self, guided: GuidedParams) -> Grammar:
        from llguidance import LLMatcher

        if self._library_tokenizer is None:
            self._library_tokenizer = _make_library_tokenizer(self._tokenizer)
        matcher = LLMatcher(self._library_tokenizer, _library_grammar(guided), log_level=0)
        if matcher.is_error():
            raise RequestError(f"{_describe(guided)}: {_one_line(matcher.get_error())}", param="guided")
        return Grammar(matcher, guided.json is not None or guided.json_object)


class GrammarState:
    """How far one sequence's output has come in its grammar."""

    def __init__(self, grammar: Grammar, vocab_size: int) -> None:
        self._matcher = grammar.matcher.deep_copy()
        self._mask: npt.NDArray[np.int32] = np.zeros(-(-vocab_size // 32), dtype=np.int32)

    def fill_mask(self, bitmask_row: torch.Tensor) -> None:
        """Set the bits of the tokens that may come next. bitmask_row [W] int32 on the host, contiguous.

        Ids beyond the tokenizer's vocabulary (padding of the model's) are not allowed. Nothing is allowed once the
        grammar became too complex to follow, or a token was accepted that it does not allow.
        """
        row = bitmask_row.numpy()
        if self._matcher.is_error():
            row[:] = 0
            return
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        words = min(len(row), len(self._mask))
        row[:words] = self._mask[:words]
        row[words:] = 0

    def accept(self, token_id: int) -> bool:
        """Go on by one token; False if the grammar does not allow it."""
        return self._matcher.consume_token(token_id)

    def is_finished(self) -> bool:
        """Whether the output is complete and only an end-of-sequence token may follow."""
        return self._matcher.is_stopped()


class _Vocabulary:
    """The tokenizer as llguidance wants to see it."""

    is_tokenizer_wrapper = True
    bos_token_id: int | None = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_ids[0]
        self.special_token_ids = sorted(tokenizer.special_ids | set(tokenizer.eos_token_ids))
        self.tokens: Sequence[bytes] = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]
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


def _make_library_tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    from llguidance import LLTokenizer

    if not tokenizer.eos_token_ids:
        raise RequestError(
            "guided decoding needs a tokenizer with an end-of-sequence token; this model's has none", param="guided"
        )
    vocabulary = _Vocabulary(tokenizer)
    return LLTokenizer(
        vocabulary,  # type: ignore[arg-type]
        n_vocab=tokenizer.vocab_size,
        eos_token=list(tokenizer.eos_token_ids),
    )


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
