"""What each token of a vocabulary adds to the text, as bytes and as a string, by token id.

Decoders of the `tokenizers` library are recognised by their serialised form. For the common ones the text of a sequence
is the concatenation of a table's entries, up to rules at the start of the text and for bytes; `plan_for` says which. A
recognised plan is checked against the library on sequences of the vocabulary itself, and dropped when they differ.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer as Backend

REPLACEMENT = "\ufffd"

Kind = Literal["byte_level", "pieces"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a decoder makes text.

    kind "byte_level": tokens are strings over GPT-2's byte alphabet; the text is the UTF-8 of all bytes.
    kind "pieces": `piece(token)` is the text of a token that is not the first, `first(token)` of the first;
    `<0xE2>` tokens are bytes when `byte_fallback`; one leading space of the text is dropped when `strip_leading_space`.
    """

    kind: Kind
    piece: Callable[[str], str] = str
    first: Callable[[str], str] | None = None
    byte_fallback: bool = False
    strip_leading_space: bool = False


def plan_for(decoder: dict[str, Any] | None) -> Plan | None:
    """The plan of a serialised decoder (`tokenizer.json`'s `decoder`), None when there is none."""
    if decoder is None:  # the library joins with spaces
        return Plan("pieces", piece=lambda token: " " + token, first=str)
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return Plan("byte_level")
    if len(steps) == 1 and steps[0]["type"] == "WordPiece":
        return _word_piece_plan(steps[0])
    return _pieces_plan(steps)


def _word_piece_plan(step: dict[str, Any]) -> Plan:
    prefix, cleanup = step["prefix"], step["cleanup"]

    def first(token: str) -> str:
        return _undo_tokenization_spaces(token) if cleanup else token

    def piece(token: str) -> str:
        return first(token[len(prefix) :] if token.startswith(prefix) else " " + token)

    return Plan("pieces", piece=piece, first=first)


def _undo_tokenization_spaces(text: str) -> str:
    """WordPiece's clean-up of one token, in the library's order."""
    for spaced, joined in (
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" do not", " don't"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ):
        text = text.replace(spaced, joined)
    return text


def _pieces_plan(steps: list[dict[str, Any]]) -> Plan | None:
    """SentencePiece's decoders: replacements, byte fallback, ▁ for a space, and a stripped leading space, in this
    order.
    """
    replacements: list[tuple[str, str]] = []
    byte_fallback = strip = dropped_at_start = False
    stage = 0
    for step in steps:
        kind = step["type"]
        order = {"Replace": 0, "ByteFallback": 1, "Metaspace": 2, "Fuse": 3, "Strip": 4}.get(kind)
        if order is None or order < stage:
            return None
        stage = order
        if kind == "Replace":
            if "String" not in step["pattern"]:
                return None
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "ByteFallback":
            byte_fallback = True
        elif kind == "Metaspace":
            replacements.append((step["replacement"], " "))
            dropped_at_start = step.get("prepend_scheme", "always") != "never"
        elif kind == "Strip":
            if (
                step["content"] != " "
                or step["stop"] != 0
                or step["start"] > 1
                or "Fuse" not in [s["type"] for s in steps]
            ):
                return None
            strip = step["start"] == 1
    if strip and dropped_at_start:
        return None
    piece = functools.partial(_replace_all, replacements)
    if not dropped_at_start:
        return Plan("pieces", piece=piece, byte_fallback=byte_fallback, strip_leading_space=strip)
    at_start = [*replacements[:-1], (replacements[-1][0], "")]
    first = functools.partial(_replace_all, at_start)
    return Plan("pieces", piece=piece, first=first, byte_fallback=byte_fallback)


def _replace_all(replacements: Sequence[tuple[str, str]], token: str) -> str:
    for old, new in replacements:
        token = token.replace(old, new)
    return token


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's map from printable characters to bytes (Radford et al. 2019): the byte's own character where that is
    printable in Latin-1, else the next free code point from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@functools.cache
def _latin1_translation() -> dict[int, int]:
    """For str.translate: alphabet → Latin-1 character of the byte; Latin-1 characters outside of it → not encodable."""
    table = dict.fromkeys(range(256), 65535)
    table.update({ord(char): byte for char, byte in byte_alphabet().items()})
    return table


def _byte_level_bytes(token: str) -> bytes:
    try:
        return token.translate(_latin1_translation()).encode("latin-1")
    except UnicodeEncodeError:  # an added token with other characters stands for itself
        return token.encode()


def _fallback_byte(token: str) -> int | None:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


class TokenTable:
    """The table of one tokenizer.

    `texts[id]`: the token's text after others; None when it is not whole characters (bytes of one). `data[id]`: its
    bytes. Ids that the vocabulary lacks are "" and b"". `plan` is None when the decoder is not a matter of tables:
    `texts` and `data` are then approximate, for display only.
    """

    def __init__(self, backend: Backend, special_ids: Collection[int]) -> None:
        self.special_ids = frozenset(special_ids)
        tokens: list[str | None] = []
        for token, index in backend.get_vocab(with_added_tokens=True).items():
            if index >= len(tokens):
                tokens.extend([None] * (index + 1 - len(tokens)))
            tokens[index] = token
        for index, found in enumerate(tokens):  # two ids may share one string
            if found is None:
                tokens[index] = backend.id_to_token(index)
        self.tokens = tokens
        plan = _recognise(backend.decoder)
        self.data: list[bytes] = []
        self.texts: list[str | None] = []
        self._visible: list[str | None] | None = None  # texts without the special tokens
        self._fill(plan or Plan("pieces"))
        self.plan = plan if plan is not None and self._agrees_with(backend, plan) else None

    def texts_without(self, skipped: frozenset[int]) -> list[str | None]:
        """`texts` with the skipped (special) tokens empty; kept, one list for all sequences."""
        if not skipped:
            return self.texts
        if self._visible is None:
            visible = list(self.texts)
            for index in skipped:
                visible[index] = ""
            self._visible = visible
        return self._visible

    def _fill(self, plan: Plan) -> None:
        if plan.kind == "byte_level":
            self.data = [b"" if token is None else _byte_level_bytes(token) for token in self.tokens]
            self.texts = [_whole(data) for data in self.data]
            return
        for token in self.tokens:
            byte = _fallback_byte(token) if plan.byte_fallback and token is not None else None
            if byte is not None:
                self.data.append(bytes([byte]))
                self.texts.append(None)
            else:
                text = "" if token is None else plan.piece(token)
                self.data.append(text.encode())
                self.texts.append(text)

    def _agrees_with(self, backend: Backend, plan: Plan) -> bool:
        """Whether the plan gives the library's text on sequences drawn from the vocabulary."""
        draw = random.Random(0)
        known = [index for index, token in enumerate(self.tokens) if token is not None]
        samples = [draw.choices(known, k=length) for length in (1, 1, 2, 3, 8, 32, 64, 128)] if known else []
        return all(self.decode(ids, plan) == backend.decode(ids, skip_special_tokens=False) for ids in samples)

    def decode(self, ids: Sequence[int], plan: Plan) -> str:
        """The text of `ids` by the plan, nothing skipped: the whole-sequence twin of the incremental detokenizer."""
        if plan.kind == "byte_level":
            return b"".join([self.data[index] for index in ids]).decode("utf-8", "replace")
        parts: list[str] = []
        run = b""
        for position, index in enumerate(ids):
            text = self.texts[index]
            if text is None:
                run += self.data[index]
                continue
            parts.append(decode_run(run))
            run = b""
            parts.append(self.first_text(index, plan) if position == 0 else text)
        text = "".join([*parts, decode_run(run)])
        return text.removeprefix(" ") if plan.strip_leading_space else text

    def first_text(self, index: int, plan: Plan) -> str:
        """The text of a token (one with a text) at the very start."""
        token = self.tokens[index]
        return self.texts[index] or "" if plan.first is None or token is None else plan.first(token)


def decode_run(run: bytes) -> str:
    """The text of adjacent byte-fallback tokens: UTF-8 if all of it is, else one U+FFFD a byte (as `tokenizers`
    does).
    """
    try:
        return run.decode()
    except UnicodeDecodeError:
        return REPLACEMENT * len(run)


def _whole(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _recognise(decoder: Any) -> Plan | None:
    """The plan of a `tokenizers` decoder object (or None); None for one written in Python, which has no serial form."""
    if decoder is None:
        return plan_for(None)
    try:
        state = json.loads(decoder.__getstate__())
    except Exception:  # the library raises a bare Exception
        return None
    return plan_for(state) if isinstance(state, dict) and "type" in state else None
