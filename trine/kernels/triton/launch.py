"""Launching kernels, and compiling them before their first launch.

Every kernel of this package goes through `launch`. While a thread is `recording`, its launches are noted and not done:
a pass over a model then shows what its steps need, which is compiled by all processors at once, where launches compile
one kernel after the other as they come.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from triton.runtime.jit import KernelInterface


class _Thread(threading.local):
    recorder: Recorder | None = None


_thread = _Thread()


def launch(kernel: KernelInterface[Any], grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`: constexpr parameters and launch options by name, others by place."""
    if _thread.recorder is None:
        kernel[grid](*args, **options)
    else:
        _thread.recorder.note(kernel, grid, args, options)


class Recorder:
    """Compiles what it is told of, each variant once, on `threads` threads; most of a compilation holds no lock of
    Python's.
    """

    def __init__(self, device: torch.device, threads: int) -> None:
        self._device = device
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="trine-compile")
        self._variants: dict[tuple[Any, ...], Future[None]] = {}

    def note(
        self, kernel: KernelInterface[Any], grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        variant = (kernel, *map(_kind, args), *options.items())
        if variant not in self._variants:
            self._variants[variant] = self._pool.submit(self._compile, kernel, grid, args, options)

    def wait(self) -> int:
        """Until everything noted is compiled and on the device; the number of variants. Raises what a compilation
        raised.
        """
        for compiled in self._variants.values():
            compiled.result()
        self._pool.shutdown()
        return len(self._variants)

    def _compile(
        self, kernel: KernelInterface[Any], grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        with torch.cuda.device(self._device):
            compiled = kernel.warmup(*args, grid=grid, **options)
            compiled._init_handles()  # what a first launch makes: the launcher, the code's place on the device


def _kind(arg: Any) -> Any:
    """What of a run-time argument a kernel is compiled for, or more."""
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, bool | float) or arg is None:
        return type(arg)
    if isinstance(arg, int):
        return arg == 1, arg % 16 == 0, arg >= 2**31
    return _kind(arg.base), tuple(arg.block_shape)  # a descriptor of tiles


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Launches of this thread are noted, not done: what would have been written stays as it is."""
    _thread.recorder = recorder
    try:
        yield
    finally:
        _thread.recorder = None
