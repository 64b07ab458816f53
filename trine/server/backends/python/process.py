"""A model's process as the server sees it: start, messages, end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Callable
from pathlib import Path

import trine
from trine.server.backends.python import wire
from trine.server.backends.python.memory import CANCEL_FLAGS, Reader, Writer, create_region

logger = logging.getLogger("trine.server.python")

_BOOT = str(Path(__file__).with_name("boot.py"))
_PACKAGE = str(Path(trine.__file__).parent)
_MESSAGES_AT_ONCE = 64
_SOCKET_BYTES = 1 << 20


class ModelProcess:
    """One process. Everything but the constructor is called in the event loop's thread.

    on_message gets each message; on_end is called once, with how the process ended, when it has.
    """

    def __init__(self, python: str, environment: dict[str, str], name: str) -> None:
        """Start it. OSError where `python` can't be run."""
        self.name = name
        self._main, main = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._side, side = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        incoming, outgoing = create_region(f"{name}-in"), create_region(f"{name}-out")
        try:
            for end in (self._main, self._side, main, side):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
            descriptors = (main.fileno(), side.fileno(), incoming, outgoing)
            self._process = subprocess.Popen(
                [python, "-u", _BOOT, _PACKAGE, *map(str, descriptors)],
                pass_fds=descriptors,
                env=environment,
                stdin=subprocess.DEVNULL,
            )
            self.memory = Writer(incoming, CANCEL_FLAGS)
            self.reader = Reader(outgoing)
        finally:
            for end in (main, side):
                end.close()
            os.close(incoming)
            os.close(outgoing)
        for end in (self._main, self._side):
            end.setblocking(False)
        self._receiver = wire.Receiver(self._main, self.reader)
        self._unsent: dict[socket.socket, deque[bytes]] = {self._main: deque(), self._side: deque()}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pidfd = -1
        self.on_message: Callable[[wire.Message], None] = lambda message: None
        self.on_end: Callable[[str], None] = lambda reason: None
        self.ended = asyncio.Event()

    @property
    def pid(self) -> int:
        return self._process.pid

    def attach(self) -> None:
        """From now on messages and the end are told, in this event loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._main.fileno(), self._on_readable)
        # The socket's end is not enough: a process that the model forked may hold it open.
        self._pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(self._pidfd, self._on_exit)

    def send(self, *message: object) -> None:
        """Send on the main channel. What the process does not take yet waits here."""
        self._send(self._main, wire.datagram(message, self.memory))

    def send_aside(self, *message: object) -> None:
        """Send on the side channel, which is read while a batch is executed too."""
        self._send(self._side, wire.datagram(message, self.memory))

    def linger(self) -> None:
        """Wait for a message that is expected at once, and take it: quicker than by way of the event loop."""
        if not self.ended.is_set() and self._receiver.await_message(wire.PATIENCE_NS):
            self._on_readable()

    def resident_bytes(self) -> int:
        """Memory that the process takes, without what it shares with the server; 0 when it has ended."""
        try:
            with open(f"/proc/{self.pid}/statm") as file:
                _, resident, shared, *_ = file.read().split()
        except (OSError, ValueError):
            return 0
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")

    def kill(self) -> None:
        """End it at once; `on_end` follows."""
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def close(self, timeout: float) -> None:
        """Let the model finalize, for at most `timeout` seconds, then end the process."""
        if not self.ended.is_set():
            self.send(wire.FINALIZE)
            try:
                await asyncio.wait_for(self.ended.wait(), timeout)
            except TimeoutError:
                logger.warning("%s did not finish within %g s: its process is killed", self.name, timeout)
                self.kill()
                await self.ended.wait()

    def receive_blocking(self) -> wire.Message | None:
        """The next message, without an event loop; None when the process has ended."""
        self._main.setblocking(True)
        return self._receiver.receive()

    def wait(self) -> str:
        """Wait for the end, without an event loop; how it ended."""
        status = self._process.wait()
        self._main.close()
        self._side.close()
        return describe_end(status)

    def _send(self, channel: socket.socket, data: bytes) -> None:
        unsent = self._unsent[channel]
        if unsent:
            unsent.append(data)
            return
        try:
            channel.send(data)
        except BlockingIOError:
            unsent.append(data)
            assert self._loop is not None
            self._loop.add_writer(channel.fileno(), self._on_writable, channel)
        except OSError:
            return  # it has ended; `on_end` tells

    def _on_writable(self, channel: socket.socket) -> None:
        unsent = self._unsent[channel]
        try:
            while unsent:
                channel.send(unsent[0])
                unsent.popleft()
        except BlockingIOError:
            return
        except OSError:
            unsent.clear()
        assert self._loop is not None
        self._loop.remove_writer(channel.fileno())

    def _on_readable(self) -> None:
        for _ in range(_MESSAGES_AT_ONCE):
            try:
                message = self._receiver.receive()
            except BlockingIOError:
                return
            except ConnectionResetError:
                message = None
            except (OSError, ValueError, EOFError, TypeError) as error:
                logger.error("%s sends what is no message (%s): its process is killed", self.name, error)
                self._stop_reading()
                self.kill()
                return
            if message is None:
                self._stop_reading()
                self.kill()  # it can't be reached any more
                return
            self.on_message(message)

    def _stop_reading(self) -> None:
        assert self._loop is not None
        self._loop.remove_reader(self._main.fileno())

    def _on_exit(self) -> None:
        assert self._loop is not None
        self._on_readable()  # what it sent before it ended
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        status = self._process.wait()
        for channel, unsent in self._unsent.items():
            unsent.clear()
            self._loop.remove_reader(channel.fileno())
            self._loop.remove_writer(channel.fileno())
            channel.close()
        self.ended.set()
        self.on_end(describe_end(status))


def describe_end(status: int) -> str:
    """How a process ended, in words: "was ended by SIGSEGV"."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was ended by {name}"
