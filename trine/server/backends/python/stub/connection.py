"""The model process's end of the wire: what any of its threads may send, and what it gets back.

The main channel carries batches in and everything out, the side channel brings answers to what the model asked for. A
thread of its own reads the side channel, so that calls to other models get answers while `execute` waits for them.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from trine.server.backends.python import wire
from trine.server.backends.python.memory import Lease, Reader, Writer
from trine.server.backends.python.stub.errors import TritonModelException

Waiter = Callable[[wire.Message], None]
_MISSES = 8
_TRY_EVERY = 16


class Connection:
    """One for the process; `connection` below is it."""

    def __init__(self, main: int, side: int, incoming: int, outgoing: int) -> None:
        self._main = socket.socket(fileno=main)
        self._side = socket.socket(fileno=side)
        self.memory = Reader(incoming)
        self._outgoing = Writer(outgoing)
        self._lock = threading.Lock()
        self._receiver = wire.Receiver(self._main, self.memory)
        self._late: deque[wire.Message] = deque()
        self._waiting: dict[int, Waiter] = {}
        self._calls = 0
        self._misses = _MISSES  # messages in a row that did not come at once
        self.on_readiness: Callable[[int], None] = lambda call: None
        self.accepts_bls = False

    def start(self) -> None:
        threading.Thread(target=self._read_side, name="side channel", daemon=True).start()

    def receive(self) -> wire.Message | None:
        """The next batch, or whatever else is for the main thread.

        It is looked for without sleeping where one of the last came at once; else now and then, to learn if they do.
        """
        self._misses += 1
        looks = self._misses < _MISSES or self._misses % _TRY_EVERY == 0
        if looks and self._receiver.await_message(wire.PATIENCE_NS):
            self._misses = 0
        return self._receiver.receive()

    def content_of(self, block: wire.Block) -> Lease | bytearray:
        """The content of a message's tensors, which the model may write to."""
        content = wire.content_of(block, self.memory)
        return bytearray(content) if type(content) is bytes else content

    def is_cancelled(self, slot: int) -> bool:
        return self.memory.map[slot] == 1

    def send(self, *message: Any) -> None:
        with self._lock:
            self._main.sendall(wire.datagram(message, self._outgoing))
        if self._late:
            self._send_late()

    def send_packed(self, packer: wire.Packer, message: Callable[[wire.Block], wire.Message]) -> None:
        """Send a message with the packer's tensors in one block; `message` makes it of the block."""
        with self._lock:
            self._main.sendall(wire.datagram(message(packer.place(self._outgoing)), self._outgoing))
        if self._late:
            self._send_late()

    def send_from_destructor(self, *message: Any) -> None:
        """As `send`, but whoever is sending already, perhaps this very thread, does it when done."""
        self._late.append(message)
        self._send_late()

    def _send_late(self) -> None:
        while self._late and self._lock.acquire(blocking=False):
            try:
                while self._late:
                    self._main.sendall(wire.datagram(self._late.popleft(), self._outgoing))
            except OSError:
                self._late.clear()  # the server is gone
            finally:
                self._lock.release()

    def expect(self, waiter: Waiter) -> int:
        """Number of a call whose answers go to `waiter`, in the side channel's thread."""
        with self._lock:
            self._calls += 1
            self._waiting[self._calls] = waiter
            return self._calls

    def forget(self, call: int) -> None:
        self._waiting.pop(call, None)

    def ask(self, function: str, *arguments: Any) -> Any:
        """Call a function of the server and wait for its result. TritonModelException: what it raised."""
        answered = threading.Event()
        answer: list[wire.Message] = []

        def waiter(message: wire.Message) -> None:
            answer.append(message)
            answered.set()

        call = self.expect(waiter)
        self.send(wire.CALL, call, function, arguments)
        answered.wait()
        self.forget(call)
        _, _, result, error = answer[0]
        if error is not None:
            raise TritonModelException(error)
        return result

    def _read_side(self) -> None:
        receiver = wire.Receiver(self._side, self.memory)
        while True:
            try:
                message = receiver.receive()
            except OSError:
                message = None
            if message is None:
                os._exit(1)  # the server is gone, and nobody waits for whatever runs here
            if message[0] == wire.IS_READY:
                self.on_readiness(message[1])
                continue
            waiter = self._waiting.get(message[1])
            if waiter is not None:
                waiter(message)
            elif message[0] == wire.BLS_RESPONSE:
                wire.free(message[2], self.memory)


connection: Connection
"""Set once, when the process starts."""
