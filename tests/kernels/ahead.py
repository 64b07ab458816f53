"""Compiles kernels ahead for a Hopper GPU, on any machine: a process of its own, as the tests' runs the interpreter.

Prints a line of JSON for each of what `main` tries.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from trine.kernels import triton as kernels
from trine.kernels.triton import hopper_matrix
from trine.kernels.triton.compile_ahead import Compilation
from trine.kernels.triton.launch import Launch, Recorder, recording

WITHOUT_GPU = SimpleNamespace(
    get_current_device=lambda: 0,
    set_current_device=lambda device: None,
    get_current_stream=lambda device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    launcher_cls=lambda src, metadata: None,
    utils=SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        load_binary=lambda name, code, shared, device: (1, 1, 32, 0, 1024),
        unload_module=lambda module: None,
    ),
)
"""Triton's driver, so far as compiling goes; what is compiled is loaded nowhere."""

found: list[bool] = []
"""Of each kernel that this process asked the compiler for: whether it was on the disk."""


def noted(run: Callable[[], object]) -> list[Launch]:
    recorder = Recorder()
    with recording(recorder):
        run()
    return list(recorder.variants.values())


def norms(columns: int) -> list[Launch]:
    """Six kernels."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    inputs = [torch.empty(2, columns, dtype=dtype, device="meta") for dtype in dtypes]
    return noted(lambda: [(kernels.layer_norm(x, x[0], x[0], 1e-6), kernels.rms_norm(x, x[0], 1e-6)) for x in inputs])


def product() -> list[Launch]:
    """A kernel in Gluon, of descriptors of tiles."""
    x, weight = (torch.empty(n, 512, dtype=torch.bfloat16, device="meta") for n in (70, 128))
    return noted(lambda: hopper_matrix.linear_parts(x, weight))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def at_work(compilation: Compilation) -> list[int]:
    """Its processes that compile, as soon as there are some."""
    while not (working := children(compilation._foreman or 0)):
        time.sleep(0.001)
    return working


def report(**values: Any) -> None:
    print(json.dumps({"found": found, "children": children(os.getpid()), **values}), flush=True)
    found.clear()


def main() -> None:
    logging.basicConfig(stream=sys.stderr)
    driver.set_active(WITHOUT_GPU)
    knobs.compilation.listener = lambda src, metadata, metadata_group, times, cache_hit: found.append(cache_hit)

    needed, others = Compilation(product(), 2), Compilation(norms(1024), 2, background=True)
    needed.start()
    others.start(after=needed)
    needed.wait()
    others.wait()
    report(case="compiled")

    compilation = Compilation(norms(2048), 1)
    os.kill(at_work(compilation)[0], signal.SIGKILL)
    compilation.start()
    compilation.wait()
    report(case="one killed")

    compilation = Compilation(norms(4096), 2)
    os.kill(compilation._foreman or 0, signal.SIGKILL)
    compilation.start()
    compilation.wait()
    report(case="all killed")

    compilation = Compilation(norms(8192), 1)
    compilation.start()
    compilation.close()
    report(case="closed")

    compilation = Compilation(norms(16384), 1)
    report(case="orphaned", left=[compilation._foreman, *at_work(compilation)])
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
