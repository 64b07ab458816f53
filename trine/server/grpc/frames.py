"""HTTP/2's frames (RFC 9113) and the few header blocks (RFC 7541) that a gRPC server sends."""

from __future__ import annotations

import struct
from collections import deque

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER_SIZE = 9

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITIZED = 0x1, 0x1, 0x4, 0x8, 0x20

NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 0x0, 0x1, 0x2, 0x3
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR = 0x5, 0x6, 0x7, 0x8, 0x9
ENHANCE_YOUR_CALM = 0xB

HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = (
    range(1, 7)
)
MAX_WINDOW = 2**31 - 1
LARGEST_FRAME = 2**24 - 1

unpack_header = struct.Struct(">HBBBI").unpack_from
_pack_header = struct.Struct(">HBBBI").pack
_SETTING = struct.Struct(">HI")


class ConnectionFailureError(Exception):
    """The peer broke the protocol so that the connection can't go on."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def header(length: int, kind: int, flags: int, stream: int) -> bytes:
    """A frame's first nine bytes."""
    return _pack_header(length >> 8, length & 0xFF, kind, flags, stream)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return header(len(payload), kind, flags, stream) + payload


def settings(values: dict[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(key, value) for key, value in values.items()))


def parse_settings(payload: bytes) -> dict[int, int]:
    if len(payload) % _SETTING.size:
        raise ConnectionFailureError(FRAME_SIZE_ERROR, "SETTINGS of a length that is no multiple of 6")
    return dict(_SETTING.iter_unpack(payload))


def window_update(stream: int, amount: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, amount.to_bytes(4, "big"))


def rst_stream(stream: int, code: int) -> bytes:
    return frame(RST_STREAM, 0, stream, code.to_bytes(4, "big"))


def goaway(last_stream: int, code: int, message: str = "") -> bytes:
    return frame(GOAWAY, 0, 0, last_stream.to_bytes(4, "big") + code.to_bytes(4, "big") + message.encode())


def unpadded(payload: bytes, flags: int) -> bytes:
    """A payload without its padding."""
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ConnectionFailureError(PROTOCOL_ERROR, "more padding than payload")
    return payload[1 : len(payload) - payload[0]]


def _length(value: int) -> bytes:
    """An integer in seven bits and what follows."""
    if value < 127:
        return bytes((value,))
    encoded = bytearray((127,))
    value -= 127
    while value >= 128:
        encoded.append(value % 128 + 128)
        value //= 128
    encoded.append(value)
    return bytes(encoded)


def literal(name: str, value: str) -> bytes:
    """A header field that leaves both sides' tables alone."""
    return b"\x00" + _length(len(name)) + name.encode() + _length(len(value)) + value.encode("latin-1")


_STATUS_200 = b"\x88"
RESPONSE_BLOCK = _STATUS_200 + literal("content-type", "application/grpc")
OK_BLOCK = literal("grpc-status", "0")
_MESSAGE_LIMIT = 4096  # clients refuse trailers of more than 8 KiB


def status_block(code: int, message: str) -> bytes:
    """Trailers."""
    if code == 0:
        return OK_BLOCK
    return literal("grpc-status", str(code)) + literal("grpc-message", percent_encoded(message))


def percent_encoded(message: str) -> str:
    encoded = "".join(
        chr(byte) if 0x20 <= byte < 0x7F and byte != 0x25 else f"%{byte:02X}"
        for byte in message.encode("utf-8", "replace")[:_MESSAGE_LIMIT]
    )
    return encoded[:_MESSAGE_LIMIT].rsplit("%", 1)[0] if len(encoded) > _MESSAGE_LIMIT else encoded


def cut(queue: deque[bytes | memoryview], room: int) -> tuple[list[bytes | memoryview], int]:
    """Up to `room` bytes from the front; nothing is copied."""
    pieces: list[bytes | memoryview] = []
    size = 0
    while queue and size < room:
        part = queue.popleft()
        take = min(len(part), room - size)
        if take < len(part):
            view = memoryview(part)
            queue.appendleft(view[take:])
            part = view[:take]
        pieces.append(part)
        size += take
    return pieces, size
