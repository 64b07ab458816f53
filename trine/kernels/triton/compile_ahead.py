"""Compiles kernels ahead of their first launch, in processes: much of a compilation holds the interpreter's lock, which
serving needs.

A forked process, the foreman, forks another for every kernel, as many at a time as there are processors. They have all
that this process had, so nothing is pickled, and leave what they make in Triton's cache on the disk, where the same
call finds it in this process. None of them may use CUDA, which does not survive a fork: they ask for no device, no
stream and no memory, collect no garbage and end without cleaning up.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from triton.runtime import cache, driver

from trine.kernels.triton.launch import Launch

logger = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds without a kernel after which the processes are given up: the longest takes 5. One can hang from its start, by
a lock that another thread of this process held when it forked."""
THREADS = 4
"""That compile what the processes did not."""


_preparing = threading.Lock()


def prepare() -> None:
    """Make what every kernel needs, once in a process: the driver's functions, which a C compiler builds if no cache
    has them, and a hash of Triton's libraries, which is part of every key. Neither holds the interpreter's lock long.
    """
    with _preparing:
        _ = driver.active
        if hasattr(cache, "triton_key"):
            cache.triton_key()


class Compilation:
    """Of the kernels of some launches, by so many processes at a time, in that order; it has begun. In the `background`
    it leaves processors to whoever else wants them.

    A thread, to be started, loads them into this process as they come, and compiles what the processes failed to.
    """

    def __init__(self, launches: Sequence[Launch], processes: int, *, background: bool = False) -> None:
        prepare()
        self._launches = launches
        self._device = driver.active.get_current_device()
        self._closed = False
        self._finished, results = Pipe(duplex=False)
        target, parent = driver.active.get_current_target(), os.getpid()
        self._foreman = _fork()
        if self._foreman == 0:
            _oversee(launches, processes, 19 if background else 0, results, parent, self._device, target)
        results.close()

    def start(self, after: Compilation | None = None) -> None:
        """Start the thread, or have it wait for another's first."""
        self._thread = threading.Thread(target=self._load_all, args=(after,), name="trine-compile")
        self._thread.start()

    def wait(self) -> None:
        """Until all kernels are loaded, or can't be."""
        self._thread.join()

    def close(self) -> None:
        """Leave the rest to launches, and end the processes."""
        self._closed = True
        self._thread.join()

    def _load_all(self, after: Compilation | None) -> None:
        left = set(range(len(self._launches)))
        try:
            if after is not None:
                after.wait()
            driver.active.set_current_device(self._device)
            for index in self._indices():
                left.remove(index)
                self._load(index)
        finally:
            self._end()
        if left and not self._unwanted():
            logger.warning("%d kernels could not be compiled by processes of their own: threads do it", len(left))
            here = (self._device,)
            with ThreadPoolExecutor(THREADS, "trine-compile", driver.active.set_current_device, here) as pool:
                list(pool.map(self._load, sorted(left)))

    def _load(self, index: int) -> None:
        if self._unwanted():
            return
        kernel, grid, args, options = self._launches[index]
        try:
            compiled = kernel.warmup(*args, grid=grid, **options)
            compiled._init_handles()  # the launcher, and the code's place on the device
        except Exception:  # its first launch, if there is one, says it again
            logger.warning("a kernel could not be compiled ahead of its first launch", exc_info=True)

    def _indices(self) -> Iterator[int]:
        """Of the launches whose kernels are compiled, until there will be no more."""
        deadline = time.monotonic() + PATIENCE
        while not self._unwanted() and time.monotonic() < deadline:
            try:
                if self._finished.poll(0.2):
                    yield self._finished.recv()
                    deadline = time.monotonic() + PATIENCE
            except EOFError:
                break

    def _unwanted(self) -> bool:
        """Also when the program is at its end, and the interpreter waits for its threads."""
        return self._closed or not threading.main_thread().is_alive()

    def _end(self) -> None:
        self._finished.close()
        if self._foreman is None:
            return
        for end in (os.killpg, os.kill):  # it may have no group yet
            with suppress(ProcessLookupError):
                end(self._foreman, signal.SIGKILL)
        with suppress(ChildProcessError):  # of a program that ignores its children's ends, or collects all of them
            os.waitpid(self._foreman, 0)


def _fork() -> int | None:
    """os.fork(), or None when there can be no more processes. No garbage is collected in the child."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other threads: the child waits for none
            child: int | None = os.fork()
    except OSError:
        child = None
    if child != 0 and collects:
        gc.enable()
    return child


def _oversee(
    launches: Sequence[Launch],
    processes: int,
    niceness: int,
    results: Connection,
    parent: int,
    device: int,
    target: Any,
) -> NoReturn:
    """What the foreman does: it sends the index of every kernel that was compiled, and ends when `parent` does."""
    try:
        _detach(results.fileno(), device, target)
        os.nice(niceness)
        waiting = list(enumerate(launches))[::-1]
        running: dict[int, int] = {}
        while waiting or running:
            while waiting and len(running) < processes:
                index, launch = waiting.pop()
                child = os.fork()
                if child == 0:
                    _compile(launch)
                running[child] = index
            signal.sigtimedwait([signal.SIGCHLD], 0.5)
            if os.getppid() != parent:
                os.killpg(0, signal.SIGKILL)
            while running:
                child, status = os.waitpid(-1, os.WNOHANG)
                if child == 0:
                    break
                index = running.pop(child)
                if status == 0:
                    results.send(index)
    finally:
        os._exit(0)


def _detach(results: int, device: int, target: Any) -> None:
    """Let go of the terminal, the files and the GPU of the process that forked this one."""
    os.setpgid(0, 0)  # an interrupt at the terminal is not for this one
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    logging.disable()
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    os.closerange(3, results)  # a socket's or a GPU's other user should see that its owner is gone
    os.closerange(results + 1, os.sysconf("SC_OPEN_MAX"))
    active = driver.active
    active.get_current_device = lambda: device
    active.get_current_stream = lambda device: 0
    active.get_current_target = lambda: target


def _compile(launch: Launch) -> NoReturn:
    kernel, grid, args, options = launch
    try:
        compiled = kernel.warmup(*args, grid=grid, **options)
        driver.active.launcher_cls(compiled.src, compiled.metadata)  # older Tritons build one for each signature
        os._exit(0)
    finally:
        os._exit(1)
