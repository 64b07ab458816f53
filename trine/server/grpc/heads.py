"""The head of a call: its header block decoded, and what gRPC reads in it.

A client that repeats itself sends the same bytes for each call once its table is built. As long as the table stands
still, the same bytes mean the same head: they are decoded once.
"""

from __future__ import annotations

from typing import Any

from hpack import Decoder
from hpack.exceptions import HPACKError

from trine.server.grpc.frames import COMPRESSION_ERROR, ENHANCE_YOUR_CALM, ConnectionFailureError

_UNITS = {"H": 3_600_000_000_000, "M": 60_000_000_000, "S": 1_000_000_000, "m": 1_000_000, "u": 1_000, "n": 1}
_REMEMBERED = 512
MAX_HEADER_LIST = 64 << 10


class RequestHead:
    """timeout_ns: None without a deadline. problem: why this is no gRPC call, as HTTP status and text."""

    __slots__ = ("accepts", "encoding", "metadata", "path", "problem", "timeout_ns")

    def __init__(self, fields: list[tuple[bytes, bytes]]) -> None:
        self.metadata: dict[str, str] = {}
        pseudo: dict[bytes, bytes] = {}
        for name, value in fields:
            if name[:1] == b":":
                pseudo[name] = value
            else:
                self.metadata.setdefault(name.decode("latin-1"), value.decode("latin-1"))
        self.path = pseudo.get(b":path", b"").decode("latin-1")
        self.encoding = self.metadata.get("grpc-encoding", "identity")
        self.accepts = [name.strip() for name in self.metadata.get("grpc-accept-encoding", "").split(",")]
        self.timeout_ns = parse_timeout(self.metadata.get("grpc-timeout"))
        self.problem: tuple[int, str] | None = None
        if pseudo.get(b":method") != b"POST":
            self.problem = (405, "gRPC calls are POST requests")
        elif not self.metadata.get("content-type", "").startswith("application/grpc"):
            self.problem = (415, "gRPC calls have the content-type application/grpc")


def parse_timeout(text: str | None) -> int | None:
    """Nanoseconds of a `grpc-timeout`; None where there is none, or none that can be read."""
    if not text or text[-1] not in _UNITS or not text[:-1].isdigit() or len(text) > 9:
        return None
    return int(text[:-1]) * _UNITS[text[-1]]


class HeadReader:
    """Decodes the header blocks of one connection, in order."""

    def __init__(self) -> None:
        self._decoder = Decoder(MAX_HEADER_LIST)
        self._known: dict[bytes, RequestHead] = {}

    def read(self, block: bytes) -> RequestHead:
        """Raises ConnectionFailureError: after a block that can't be decoded nothing can be."""
        found = self._known.get(block)
        if found is not None:
            return found
        before = self._table()
        try:
            fields: Any = self._decoder.decode(block, raw=True)
        except HPACKError as error:
            code = ENHANCE_YOUR_CALM if "Oversized" in type(error).__name__ else COMPRESSION_ERROR
            raise ConnectionFailureError(code, f"header block: {error}") from error
        except (IndexError, ValueError) as error:
            raise ConnectionFailureError(COMPRESSION_ERROR, f"header block: {error}") from error
        head = RequestHead(fields)
        if self._table() != before or len(self._known) >= _REMEMBERED:
            self._known.clear()
        if self._table() == before:
            self._known[block] = head
        return head

    def _table(self) -> tuple[int, int, int]:
        """What changes when the dynamic table does."""
        entries = self._decoder.header_table.dynamic_entries
        return len(entries), id(entries[0]) if entries else 0, self._decoder.header_table.maxsize
