"""Byte counts as people write and read them."""

from __future__ import annotations

import re

from trine.core.errors import ConfigurationError

_UNITS = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


def parse_size(text: str | int, *, name: str = "size") -> int:
    """Bytes in `text`: a number with an optional unit, decimal (kB, MB, GB, TB) or binary (KiB, MiB, GiB, TiB).

    The B may be left out ("4G", "512Mi"). Raises ConfigurationError naming `name`.
    """
    match = _SIZE.fullmatch(str(text))
    if match is None:
        raise ConfigurationError(
            f"{name}={text!r} is not a size: write bytes, or a number with a unit such as 4GiB or 512MB"
        )
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def format_bytes(count: float) -> str:
    """`count` bytes in binary units with three significant digits: "0 B", "1.50 KiB", "23.4 GiB"."""
    if abs(count) < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if abs(count) < 1023.5 or unit == "TiB":
            break
    digits = 2 if abs(count) < 9.995 else 1 if abs(count) < 99.95 else 0
    return f"{count:.{digits}f} {unit}"
