"""The engine from its user's side: in a thread of this process, or in a process of its own. One protocol for both.

Messages to the engine: ("add", [SequenceRequest]), ("abort", [sequence id]), ("close",). From it: ("ready",
EngineInfo), ("failed", error), ("step", StepOutput). An engine that fails says so and is gone; `AsyncLLM` starts
another.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from trine.core.errors import EngineDeadError, TrineError
from trine.llm.options import EngineOptions, available_cpus

logger = logging.getLogger(__name__)

Message = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine decided when it started. `summary` is for people: memory and limits, a line each."""

    model_name: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    block_size: int
    eos_token_ids: tuple[int, ...]
    sampling_defaults: dict[str, Any]
    summary: tuple[str, ...]


def serve_engine(
    options: EngineOptions, receive: Callable[[bool], Message | None], send: Callable[[Message], None]
) -> None:
    """Load an engine and run it until told to close. `receive(wait)` gives the next message, or None if there is
    none.
    """
    from trine.llm.build import build_engine

    try:
        core, info = build_engine(options)
    except TrineError as error:
        send(("failed", error))
        return
    send(("ready", info))
    try:
        while True:
            message = receive(not core.has_work)
            while message is not None:
                if message[0] == "close":
                    return
                if message[0] == "add":
                    for request in message[1]:
                        core.add(request)
                elif message[0] == "abort":
                    for sequence_id in message[1]:
                        core.abort(sequence_id)
                message = receive(False)
            if core.has_work:
                output = core.step()
                if output.outputs:
                    send(("step", output))
                if not core.has_work:
                    core.check()
    finally:
        core.close()


class EngineTransport(Protocol):
    """A running engine. Callbacks are called in the event loop that started it; `on_end` once, with the reason."""

    def send(self, message: Message) -> None: ...
    async def close(self) -> None: ...


OnMessage = Callable[[Message], None]
OnEnd = Callable[[str], None]


class ThreadTransport:
    """The engine in a thread of this process."""

    def __init__(self, options: EngineOptions, on_message: OnMessage, on_end: OnEnd) -> None:
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        loop = asyncio.get_running_loop()

        def receive(wait: bool) -> Message | None:
            try:
                return self._inbox.get(block=wait)
            except queue.Empty:
                return None

        def run() -> None:
            reason = "the engine was closed"
            try:
                serve_engine(options, receive, lambda message: _call(loop, on_message, message))
            except Exception as error:
                logger.exception("the engine failed")
                reason = f"{type(error).__name__}: {error}"
            _call(loop, on_end, reason)

        self._thread = threading.Thread(target=run, name="trine-engine", daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        self._inbox.put(message)

    async def close(self) -> None:
        self.send(("close",))
        await asyncio.to_thread(self._thread.join, 30)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[Any], None], argument: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, argument)


class ProcessTransport:
    """The engine in a child process, over a socket pair: pickled messages with a length in front.

    Both ends are ours and the socket has no address, so nobody else can write to it. The child is started as a plain
    command rather than by multiprocessing, which would import the user's main module again.
    """

    def __init__(self, options: EngineOptions, on_message: OnMessage, on_end: OnEnd) -> None:
        ours, theirs = socket.socketpair()
        environment = dict(os.environ)
        # An idle OpenMP thread must sleep, not spin: the server's own process needs the core.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        environment.setdefault("OMP_NUM_THREADS", str(options.threads or available_cpus()))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trine.llm.client", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
        )
        theirs.close()
        self._connection: Connection[Any, Any] = Connection(ours.detach())
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._on_message = on_message
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._ended = False
        self._loop.add_reader(self._connection.fileno(), self._read)
        threading.Thread(target=self._write, name="trine-engine-writer", daemon=True).start()
        self._outbox.put(pickle.dumps(options))

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: Message) -> None:
        self._outbox.put(pickle.dumps(message, protocol=5))

    def _write(self) -> None:
        """Writing may block while the engine loads; the event loop must not."""
        while (data := self._outbox.get()) is not None:
            try:
                self._connection.send_bytes(data)
            except (OSError, ValueError):
                return  # the reader sees the end as well, and reports it

    def _read(self) -> None:
        try:
            data = self._connection.recv_bytes()
        except (EOFError, OSError):
            self._end()
            return
        self._on_message(pickle.loads(data))

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        self._loop.remove_reader(self._connection.fileno())
        self._outbox.put(None)
        self._connection.close()
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._on_end(f"the engine's process ended with {_exit_text(code)}")

    async def close(self) -> None:
        if not self._ended:
            self.send(("close",))
            try:
                await asyncio.to_thread(self._process.wait, 10)
            except subprocess.TimeoutExpired:
                self._process.kill()
            self._end()


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    hint = " (out of memory? lower --cache-memory or --max-num-seqs)" if name == "SIGKILL" else ""
    return f"signal {name}{hint}"


def dead(reason: str) -> EngineDeadError:
    return EngineDeadError(
        f"the engine stopped while this request was in it: {reason}; it is being restarted, try again"
    )


def _child_main(descriptor: int) -> None:
    """The engine's process: a thread reads the socket, so that messages never wait for a step to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    connection: Connection[Any, Any] = Connection(descriptor)
    options = pickle.loads(connection.recv_bytes())
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def read() -> None:
        try:
            while True:
                inbox.put(pickle.loads(connection.recv_bytes()))
        except (EOFError, OSError):
            inbox.put(("close",))  # the parent is gone
            time.sleep(10)
            os._exit(1)  # the main thread hangs: don't outlive the parent

    threading.Thread(target=read, name="trine-engine-reader", daemon=True).start()

    def receive(wait: bool) -> Message | None:
        try:
            return inbox.get(block=wait)
        except queue.Empty:
            return None

    logging.basicConfig(level=os.environ.get("TRINE_LOG_LEVEL", "INFO").upper(), format="%(levelname)s %(message)s")
    serve_engine(options, receive, lambda message: connection.send_bytes(pickle.dumps(message, protocol=5)))


if __name__ == "__main__":
    _child_main(int(sys.argv[1]))
