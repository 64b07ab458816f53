"""HTTP/2 frame by frame: flow control, settings, pings, padding, continuation, and what breaks the protocol."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from trine.server.grpc import frames
from trine.server.grpc.server import GrpcServer
from trine.server.grpc.stream import CallError, Method, Stream

ECHO, COUNT, NEVER, FAIL = "/test/Echo", "/test/Count", "/test/Never", "/test/Fail"


def echo(stream: Stream, message: Any) -> None:
    stream.reply((bytes(message),), len(message))


def count(stream: Stream, message: Any) -> None:
    """So many messages as the message has bytes."""
    for index in range(len(message)):
        stream.send((bytes((index,)),), 1)
    stream.finish()


def fail(stream: Stream, message: Any) -> None:
    raise CallError(5, "100 % not here: ä\n")


class Peer:
    """The client's side, one frame at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def greet(self, settings: dict[int, int] | None = None) -> None:
        self.writer.write(frames.PREFACE + frames.settings(settings or {}))
        assert (await self.frame())[0] == frames.SETTINGS
        assert (await self.frame())[0] == frames.WINDOW_UPDATE
        assert (await self.frame())[:2] == (frames.SETTINGS, frames.ACK)

    async def frame(self) -> tuple[int, int, int, bytes]:
        """Kind, flags, stream and payload."""
        head = await asyncio.wait_for(self.reader.readexactly(9), 5)
        length = int.from_bytes(head[:3], "big")
        payload = await asyncio.wait_for(self.reader.readexactly(length), 5)
        return head[3], head[4], int.from_bytes(head[5:], "big"), payload

    def call(self, path: str, message: bytes | None, number: int = 1, *, flags: int = 0, **fields: str) -> None:
        named = {":method": "POST", ":scheme": "http", ":path": path, "content-type": "application/grpc", **fields}
        block = b"".join(frames.literal(name.replace("_", "-"), value) for name, value in named.items())
        self.writer.write(frames.frame(frames.HEADERS, frames.END_HEADERS | flags, number, block))
        if message is not None:
            self.writer.write(frames.frame(frames.DATA, frames.END_STREAM, number, prefixed(message)))

    async def answer(self) -> tuple[bytes, bytes]:
        """The DATA of the next call's answer, and its trailers' block."""
        data = b""
        while True:
            kind, flags, _, payload = await self.frame()
            if kind == frames.DATA:
                data += payload
            elif kind == frames.HEADERS and flags & frames.END_STREAM:
                return data, payload

    async def goodbye(self) -> tuple[int, str]:
        """The code and the text of the GOAWAY that comes."""
        while True:
            kind, _, _, payload = await self.frame()
            if kind == frames.GOAWAY:
                return int.from_bytes(payload[4:8], "big"), payload[8:].decode()


def prefixed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


@pytest.fixture
async def server() -> AsyncIterator[GrpcServer]:
    methods = {
        ECHO: Method(unary=echo),
        COUNT: Method(unary=count),
        FAIL: Method(unary=fail),
        NEVER: Method(unary=lambda stream, message: None),
    }
    made = GrpcServer(methods, max_message=1 << 20)
    yield made
    await made.close(0.1)


@pytest.fixture
async def peer(server: GrpcServer) -> AsyncIterator[Peer]:
    listener = await server.listen(host="127.0.0.1", port=0)
    reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
    yield Peer(reader, writer)
    writer.close()


async def test_a_call_and_the_same_again(peer: Peer) -> None:
    await peer.greet()
    for number in (1, 3, 5):
        peer.call(ECHO, b"hello", number)
        data, trailers = await peer.answer()
        assert data == prefixed(b"hello")
        assert trailers == frames.OK_BLOCK


async def test_a_message_in_pieces_and_padding(peer: Peer) -> None:
    await peer.greet()
    message = bytes(range(256)) * 500
    peer.call(ECHO, None)
    data = prefixed(message)
    for start in range(0, len(data), 30_000):
        part = data[start : start + 30_000]
        padded = bytes((7,)) + part + bytes(7)
        peer.writer.write(frames.frame(frames.DATA, frames.PADDED, 1, padded))
        await asyncio.sleep(0)
    peer.writer.write(frames.frame(frames.DATA, frames.END_STREAM, 1, b""))
    for window in (0, 1):
        peer.writer.write(frames.window_update(window, 1 << 20))
    assert (await peer.answer())[0] == data


async def test_byte_by_byte(peer: Peer) -> None:
    block = b"".join(
        frames.literal(*field) for field in ((":method", "POST"), (":path", ECHO), ("content-type", "application/grpc"))
    )
    wire = (
        frames.PREFACE
        + frames.settings({})
        + frames.frame(frames.HEADERS, 0, 1, block[:10])
        + frames.frame(frames.CONTINUATION, 0, 1, block[10:20])
        + frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1, block[20:])
        + frames.frame(frames.DATA, 0, 1, prefixed(b"abc")[:3])
        + frames.frame(frames.DATA, frames.END_STREAM, 1, prefixed(b"abc")[3:])
    )
    for byte in wire:
        peer.writer.write(bytes((byte,)))
        await peer.writer.drain()
    assert (await peer.answer())[0] == prefixed(b"abc")


async def test_answers_keep_to_the_windows(peer: Peer) -> None:
    """Ten bytes a stream at first: the answer comes in pieces as the client allows more."""
    await peer.greet({frames.INITIAL_WINDOW_SIZE: 10})
    peer.call(ECHO, bytes(100))
    assert (await peer.frame())[0] == frames.HEADERS
    kind, _, _, payload = await peer.frame()
    assert (kind, len(payload)) == (frames.DATA, 10)
    peer.writer.write(frames.window_update(1, 30))
    assert len((await peer.frame())[3]) == 30
    peer.writer.write(frames.settings({frames.INITIAL_WINDOW_SIZE: 1000}))
    kind, flags, _, _ = await peer.frame()
    while kind == frames.SETTINGS:
        kind, flags, _, payload = await peer.frame()
    assert (kind, flags, len(payload)) == (frames.DATA, 0, 65)
    assert (await peer.frame())[3] == frames.OK_BLOCK


async def test_the_connections_window_is_shared(peer: Peer) -> None:
    await peer.greet({frames.INITIAL_WINDOW_SIZE: 1 << 20})
    size = 40_000
    for number in (1, 3):
        peer.call(ECHO, bytes(size), number)
    received = ends = 0
    while received < 65_535:
        kind, flags, _, payload = await peer.frame()
        received += len(payload) if kind == frames.DATA else 0
        ends += bool(kind == frames.HEADERS and flags & frames.END_STREAM)
    assert received == 65_535
    peer.writer.write(frames.window_update(0, 1 << 20))
    while ends < 2:
        kind, flags, _, payload = await peer.frame()
        received += len(payload) if kind == frames.DATA else 0
        ends += bool(kind == frames.HEADERS and flags & frames.END_STREAM)
    assert received == 2 * (size + 5)


async def test_frames_are_no_larger_than_allowed(peer: Peer) -> None:
    await peer.greet({frames.INITIAL_WINDOW_SIZE: 1 << 20, frames.MAX_FRAME_SIZE: 20_000})
    peer.call(ECHO, bytes(50_000))
    sizes = []
    while True:
        kind, flags, _, payload = await peer.frame()
        if kind == frames.DATA:
            sizes.append(len(payload))
        elif kind == frames.HEADERS and flags & frames.END_STREAM:
            break
    assert sizes == [20_000, 20_000, 10_005]


async def test_a_stream_of_answers(peer: Peer) -> None:
    await peer.greet()
    peer.call(COUNT, b"xyz")
    assert (await peer.answer())[0] == b"".join(prefixed(bytes((index,))) for index in range(3))


async def test_a_failure_is_in_the_trailers(peer: Peer) -> None:
    await peer.greet()
    peer.call(FAIL, b"")
    _, trailers = await peer.answer()
    assert frames.literal("grpc-status", "5") in trailers
    assert b"100 %25 not here: %C3%A4%0A" in trailers


async def test_pings_are_answered_and_unknown_frames_ignored(peer: Peer) -> None:
    await peer.greet()
    peer.writer.write(frames.frame(0xFA, 0xFF, 77, b"whatever") + frames.frame(frames.PING, 0, 0, b"12345678"))
    assert await peer.frame() == (frames.PING, frames.ACK, 0, b"12345678")


async def test_cancellation(server: GrpcServer, peer: Peer) -> None:
    cancelled = asyncio.Event()

    def wait(stream: Stream, message: Any) -> None:
        stream.on_cancel = cancelled.set

    server.methods[NEVER] = Method(unary=wait)
    await peer.greet()
    peer.call(NEVER, b"")
    await asyncio.sleep(0.05)
    peer.writer.write(frames.rst_stream(1, frames.CANCEL))
    await asyncio.wait_for(cancelled.wait(), 5)
    assert not next(iter(server.connections)).streams
    cancelled.clear()
    peer.call(NEVER, b"", 3)
    await asyncio.sleep(0.05)
    peer.writer.close()
    await asyncio.wait_for(cancelled.wait(), 5)


async def test_a_deadline(peer: Peer) -> None:
    await peer.greet()
    peer.call(NEVER, b"", grpc_timeout="20m")
    _, trailers = await peer.answer()
    assert frames.literal("grpc-status", "4") in trailers


async def test_messages_above_the_limit(peer: Peer) -> None:
    await peer.greet()
    peer.call(ECHO, None)
    peer.writer.write(frames.frame(frames.DATA, 0, 1, b"\0" + (1 << 21).to_bytes(4, "big") + bytes(10)))
    _, trailers = await peer.answer()
    assert frames.literal("grpc-status", "8") in trailers
    kind, _, number, payload = await peer.frame()
    assert (kind, number, payload) == (frames.RST_STREAM, 1, bytes(4))


@pytest.mark.parametrize(("path", "fields", "status"), [("/nobody", {}, "12"), (ECHO, {"grpc_encoding": "br"}, "12")])
async def test_what_is_not_there(peer: Peer, path: str, fields: dict[str, str], status: str) -> None:
    await peer.greet()
    peer.call(path, None, **fields)
    peer.writer.write(frames.frame(frames.DATA, frames.END_STREAM, 1, b"\1" + prefixed(b"x")[1:]))
    _, trailers = await peer.answer()
    assert frames.literal("grpc-status", status) in trailers


async def test_draining_finishes_running_calls(server: GrpcServer, peer: Peer) -> None:
    running: list[Stream] = []
    server.methods[NEVER] = Method(unary=lambda stream, message: running.append(stream))
    await peer.greet()
    peer.call(NEVER, b"")
    await asyncio.sleep(0.05)
    closing = asyncio.create_task(server.close(5))
    assert await peer.goodbye() == (frames.NO_ERROR, "the server is stopping")
    peer.call(ECHO, b"late", 3)
    kind, _, number, payload = await peer.frame()
    assert (kind, number, int.from_bytes(payload, "big")) == (frames.RST_STREAM, 3, frames.REFUSED_STREAM)
    running[0].reply((b"done",), 4)
    assert (await peer.answer())[0] == prefixed(b"done")
    await asyncio.wait_for(closing, 5)


def header_frame(number: int, flags: int = frames.END_HEADERS, block: bytes = b"\x88") -> bytes:
    return frames.frame(frames.HEADERS, flags, number, block)


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ([frames.frame(frames.DATA, 0, 1, b"x")], frames.PROTOCOL_ERROR),
        ([frames.frame(frames.DATA, 0, 0, b"x")], frames.PROTOCOL_ERROR),
        ([header_frame(2)], frames.PROTOCOL_ERROR),
        ([header_frame(1, 0), frames.frame(frames.PING, 0, 0, bytes(8))], frames.PROTOCOL_ERROR),
        ([header_frame(1, 0), frames.frame(frames.CONTINUATION, 4, 3, b"x")], frames.PROTOCOL_ERROR),
        ([header_frame(1, frames.END_HEADERS, b"\xff\xff\xff\xff\xff\xff\xff")], frames.COMPRESSION_ERROR),
        ([header_frame(1, frames.END_HEADERS | frames.PADDED, b"\x09")], frames.PROTOCOL_ERROR),
        ([frames.frame(frames.PING, 0, 0, b"short")], frames.PROTOCOL_ERROR),
        ([frames.frame(frames.SETTINGS, 0, 0, b"short")], frames.FRAME_SIZE_ERROR),
        ([frames.settings({frames.MAX_FRAME_SIZE: 5})], frames.PROTOCOL_ERROR),
        ([frames.settings({frames.INITIAL_WINDOW_SIZE: 2**31})], frames.FLOW_CONTROL_ERROR),
        ([frames.window_update(0, 0)], frames.FLOW_CONTROL_ERROR),
        ([frames.window_update(0, frames.MAX_WINDOW)], frames.FLOW_CONTROL_ERROR),
        ([frames.rst_stream(7, 0)], frames.PROTOCOL_ERROR),
        ([frames.frame(frames.PUSH_PROMISE, 0, 1, b"")], frames.PROTOCOL_ERROR),
        ([frames.header(1 << 20, frames.HEADERS, 4, 1)], frames.FRAME_SIZE_ERROR),
        (
            [header_frame(1, 0, bytes(10)), *[frames.frame(frames.CONTINUATION, 0, 1, bytes(60_000))] * 3],
            frames.ENHANCE_YOUR_CALM,
        ),
    ],
)
async def test_what_breaks_the_protocol(peer: Peer, wrong: Sequence[bytes], code: int) -> None:
    await peer.greet()
    peer.writer.write(b"".join(wrong))
    assert (await peer.goodbye())[0] == code
    assert await asyncio.wait_for(peer.reader.read(), 5) == b""


async def test_no_http2_at_all(peer: Peer) -> None:
    peer.writer.write(b"GET / HTTP/1.1\r\n\r\n")
    code, text = await peer.goodbye()
    assert code == frames.PROTOCOL_ERROR
    assert "this port speaks gRPC" in text
