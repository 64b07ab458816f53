"""Where in a JSON text an output stands, and how long its numbers may get.

Grammars allow numbers of any length, and a model at a high temperature writes such ones: digits that no 64-bit
number holds, of which a value just outside of an exclusive bound can be made, or that parsers refuse. So numbers end
after 15 digits, which a double always keeps apart, integers after 18, exponents after 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

MAX_DIGITS = 15
MAX_INTEGER_DIGITS = 18
MAX_EXPONENT_DIGITS = 2

Mask = npt.NDArray[np.int32]

_QUOTE, _BACKSLASH, _MINUS, _PLUS, _POINT = b'"\\-+.'
_DIGITS = frozenset(b"0123456789")
_EXPONENT = frozenset(b"eE")
_NUMBER_BYTES = _DIGITS | _EXPONENT | {_MINUS, _PLUS, _POINT}


class Place(Enum):
    """What the end of the text is in."""

    STRUCTURE = 0
    STRING = 1
    ESCAPE = 2
    INTEGER = 3
    FRACTION = 4
    EXPONENT = 5


_NUMBERS = (Place.INTEGER, Place.FRACTION, Place.EXPONENT)


@dataclass(slots=True)
class JsonText:
    """Follows a JSON text byte by byte, which may be embedded in other text without quotation marks.

    digits: of the number that the text ends in, in its exponent only when it ends in that.
    """

    place: Place = Place.STRUCTURE
    digits: int = 0

    def copy(self) -> JsonText:
        return JsonText(self.place, self.digits)

    def feed(self, data: bytes) -> bool:
        """Go on; False if a number got too long."""
        is_short = True
        for byte in data:
            if self.place is Place.STRING:
                if byte == _QUOTE:
                    self.place = Place.STRUCTURE
                elif byte == _BACKSLASH:
                    self.place = Place.ESCAPE
            elif self.place is Place.ESCAPE:
                self.place = Place.STRING  # the digits of \u need no notice
            elif byte == _QUOTE:
                self.place, self.digits = Place.STRING, 0
            elif byte in _DIGITS or byte == _MINUS or self.place in _NUMBERS:
                is_short = self._feed_number(byte) and is_short
        return is_short

    def _feed_number(self, byte: int) -> bool:
        if self.place is Place.STRUCTURE:
            self.place, self.digits = Place.INTEGER, int(byte != _MINUS)
        elif byte in _DIGITS:
            self.digits += 1
        elif byte == _POINT:
            self.place = Place.FRACTION
        elif byte in _EXPONENT:
            is_short = self.digits <= MAX_DIGITS
            self.place, self.digits = Place.EXPONENT, 0
            return is_short
        elif byte not in (_MINUS, _PLUS):
            self.place, self.digits = Place.STRUCTURE, 0
            return True
        most = MAX_INTEGER_DIGITS if self.place is Place.INTEGER else MAX_DIGITS
        return self.digits <= (MAX_EXPONENT_DIGITS if self.place is Place.EXPONENT else most)


class NumberLimits:
    """Masks of the tokens that keep numbers short, for one vocabulary. Made when a place in a number first occurs."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._tokens = tokens
        numeric = [index for index, token in enumerate(tokens) if token and token[0] in _NUMBER_BYTES]
        self._numeric = sorted(numeric, key=lambda index: -len(tokens[index]))
        self._exponents = [index for index in numeric if _EXPONENT & set(tokens[index])]
        self._masks: dict[tuple[Place, int], Mask] = {}

    def mask(self, text: JsonText) -> Mask | None:
        """Tokens that may follow, a bit each, [ceil(V / 32)] int32; None where any may."""
        if text.place in (Place.STRING, Place.ESCAPE):
            return None
        key = (text.place, text.digits)
        if key not in self._masks:
            allowed = np.ones(-(-len(self._tokens) // 32) * 32, dtype=np.bool_)
            for index in self._too_long(text):
                allowed[index] = False
            self._masks[key] = np.packbits(allowed, bitorder="little").view(np.int32)
        return self._masks[key]

    def _too_long(self, text: JsonText) -> Iterator[int]:
        """Tokens that may not follow. Only exponents and tokens longer than the digits that are left need a look."""
        limit = MAX_EXPONENT_DIGITS if text.place is Place.EXPONENT else MAX_DIGITS
        room = limit - text.digits
        longer = itertools.takewhile(lambda index: len(self._tokens[index]) > room, self._numeric)
        return (
            index for index in itertools.chain(self._exponents, longer) if not text.copy().feed(self._tokens[index])
        )
