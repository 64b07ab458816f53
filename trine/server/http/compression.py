"""gzip and deflate bodies."""

from __future__ import annotations

import zlib

from trine.server.errors import Code, ServerError
from trine.server.http.exchange import Buffer

_WINDOW = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
_LEVEL = 1


class UnsupportedEncodingError(ServerError):
    """A compression that the server does not know; it is told which there are."""

    def __init__(self) -> None:
        super().__init__("Unsupported compression type", Code.UNSUPPORTED)


def decompress(body: Buffer, kind: bytes, limit: int) -> bytes | None:
    """The body's contents; None where there are more than `limit` bytes. Raises zlib.error."""
    window = _WINDOW.get(kind)
    if window is None:
        raise UnsupportedEncodingError
    decoder = zlib.decompressobj(window)
    data = decoder.decompress(body, limit + 1)
    if len(data) > limit:
        return None
    if not decoder.eof:
        raise zlib.error("it ends too early")
    return data


def compress(body: bytes, kind: bytes) -> bytes:
    encoder = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW[kind])
    return encoder.compress(body) + encoder.flush()


def accepted_encoding(header: bytes, *, binary: bool) -> bytes | None:
    """What to compress an answer with, by Accept-Encoding; None: not at all.

    One name is a client's wish. Several are what HTTP libraries send by themselves, and random floating-point numbers
    don't get smaller: then only text is compressed.
    """
    weights: dict[bytes, float] = {}
    for part in header.split(b","):
        name, _, rest = part.strip().partition(b";")
        weight = 1.0
        if rest.strip().startswith(b"q="):
            try:
                weight = float(rest.strip()[2:])
            except ValueError:
                weight = 0.0
        weights[name.strip().lower()] = weight
    if binary and len(weights) > 1:
        return None
    best = max(((weights.get(kind, 0.0), kind) for kind in (b"gzip", b"deflate")), key=lambda pair: pair[0])
    return best[1] if best[0] > weights.get(b"identity", 0.0) else None
