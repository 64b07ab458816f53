"""SentencePiece models (`tokenizer.model`) as `tokenizers` objects, without the SentencePiece or protobuf packages.

Reads the few fields of sentencepiece_model.proto (github.com/google/sentencepiece) that describe BPE and Unigram
models. Such a file holds pieces with scores; the merges of BPE are found again from them: a piece can come from any
split into two pieces, and the pair whose piece has the highest score merges first (Kudo and Richardson 2018).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

SPACE = "▁"


class PieceType(IntEnum):
    """`ModelProto.SentencePiece.Type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(slots=True)
class SentencePieceModel:
    """Pieces in id order as (text, score, type), and how texts are prepared. Defaults are the format's."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    is_unigram: bool = True
    byte_fallback: bool = False
    special_ids: dict[str, int] = field(default_factory=lambda: {"unk": 0, "bos": 1, "eos": 2})
    character_map: bytes = b""
    add_space_in_front: bool = True
    join_spaces: bool = True

    @classmethod
    def read(cls, path: Path) -> SentencePieceModel:
        """Raises ValueError when the file is no model, or is one of words or characters."""
        model = cls()
        for number, value in _fields(path.read_bytes()):
            if number == 1 and isinstance(value, bytes):
                model.pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):
                model._read_trainer(value)
            elif number == 3 and isinstance(value, bytes):
                model._read_normalizer(value)
        if not model.pieces:
            raise ValueError("it holds no pieces")
        return model

    def _read_trainer(self, data: bytes) -> None:
        for number, value in _fields(data):
            if not isinstance(value, int):
                continue
            if number == 3:
                if value not in (1, 2):
                    raise ValueError(f"its type is {value}; only Unigram (1) and BPE (2) are known")
                self.is_unigram = value == 1
            elif number == 35:
                self.byte_fallback = bool(value)
            elif number in (40, 41, 42):
                index = value if value < 2**63 else -1  # negative numbers are written in 64 bits
                self.special_ids[("unk", "bos", "eos")[number - 40]] = index

    def _read_normalizer(self, data: bytes) -> None:
        for number, value in _fields(data):
            if number == 2 and isinstance(value, bytes):
                self.character_map = value
            elif number == 3:
                self.add_space_in_front = bool(value)
            elif number == 4:
                self.join_spaces = bool(value)

    def special_token(self, role: str) -> str | None:
        """Text of `unk`, `bos` or `eos`; None when the model has none."""
        index = self.special_ids[role]
        return self.pieces[index][0] if 0 <= index < len(self.pieces) else None

    def to_backend(self) -> Backend:
        """The tokenizer. Texts after a special token are prepared like texts at the start."""
        backend = Backend(self._unigram() if self.is_unigram else self._bpe())
        backend.normalizer = normalizers.Sequence(self._normalizers())
        chain: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(chain + [decoders.Strip(" ", 1, 0)] * self.add_space_in_front)
        for text, _, kind in self.pieces:
            if kind in (PieceType.CONTROL, PieceType.UNKNOWN):
                backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])
            elif kind == PieceType.USER_DEFINED:
                backend.add_tokens([AddedToken(text, normalized=False)])
        return backend

    def _normalizers(self) -> list[normalizers.Normalizer]:
        steps: list[normalizers.Normalizer] = (
            [normalizers.Precompiled(self.character_map)] if self.character_map else []
        )
        if self.join_spaces:
            steps.append(normalizers.Replace(Regex(" {2,}"), " "))
            if not any(kind == PieceType.USER_DEFINED for *_, kind in self.pieces):
                steps.append(normalizers.Strip())  # would strip around user-defined pieces too
        if self.add_space_in_front:
            steps.append(normalizers.Prepend(SPACE))
        return [*steps, normalizers.Replace(" ", SPACE)]

    def _unigram(self) -> models.Model:
        vocab = [(text, score) for text, score, _ in self.pieces]
        return models.Unigram(vocab, unk_id=max(0, self.special_ids["unk"]), byte_fallback=self.byte_fallback)

    def _bpe(self) -> models.Model:
        vocab = {text: index for index, (text, _, _) in enumerate(self.pieces)}
        merges: list[tuple[float, int, int, tuple[str, str]]] = []
        for text, score, kind in self.pieces:
            if kind != PieceType.NORMAL:
                continue
            for cut in range(1, len(text)):
                left, right = vocab.get(text[:cut]), vocab.get(text[cut:])
                if left is not None and right is not None:
                    merges.append((-score, left, right, (text[:cut], text[cut:])))
        merges.sort()
        return models.BPE(
            vocab,
            [pair for *_, pair in merges],
            unk_token=self.special_token("unk"),
            fuse_unk=True,
            byte_fallback=self.byte_fallback,
        )


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, int(PieceType.NORMAL)
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
    return text, score, kind


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a protobuf message: varints as int, the others as bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"it is no protobuf message (wire type {wire} at byte {position})")
        if position + length > len(data):
            raise ValueError("it ends in the middle of a field")
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """An unsigned integer of seven bits a byte, least significant first, and the position after it."""
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError(f"it is no protobuf message (bad number at byte {position})")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
