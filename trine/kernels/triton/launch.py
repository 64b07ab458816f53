"""Launching kernels, and compiling them before their first launch.

Every kernel of this package goes through `launch`. While a thread is `recording`, its launches are noted and not done:
a pass over a model then shows what its steps need, which `compile_ahead` compiles by all processors at once, where
launches compile one kernel after the other as they come.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from triton.runtime.jit import KernelInterface

Launch = tuple[KernelInterface[Any], tuple[int, ...], tuple[Any, ...], dict[str, Any]]
"""Kernel, grid, what is passed by place, what is passed by name."""


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
    """What launches would have had to compile, each variant of a kernel once."""

    def __init__(self) -> None:
        self.variants: dict[tuple[Any, ...], Launch] = {}

    def note(
        self, kernel: KernelInterface[Any], grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        variant = (kernel, *map(_kind, args), *options.items())
        if variant not in self.variants:
            self.variants[variant] = kernel, grid, tuple(map(_stand_in, args)), options


def _kind(arg: Any) -> Any:
    """What of a run-time argument a kernel is compiled for, or more."""
    if isinstance(arg, torch.Tensor):
        return arg.dtype, _aligned(arg)
    if isinstance(arg, bool | float) or arg is None:
        return type(arg)
    if isinstance(arg, int):
        return arg == 1, arg % 16 == 0, arg >= 2**31
    return _kind(arg.base), tuple(arg.block_shape)  # a descriptor of tiles


def _aligned(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0


def _stand_in(arg: Any) -> Any:
    """The same to a compiler, without the memory: a tensor at address 0, or just beyond."""
    if isinstance(arg, torch.Tensor):
        return torch.empty(2, dtype=arg.dtype, device="meta")[0 if _aligned(arg) else 1 :]
    return replace(arg, base=_stand_in(arg.base)) if hasattr(arg, "base") else arg


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Launches of this thread are noted, not done: what would have been written stays as it is."""
    _thread.recorder = recorder
    try:
        yield
    finally:
        _thread.recorder = None
