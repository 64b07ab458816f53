"""What launches need to know of the device, and the few sizes that kernels are compiled for."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; on a CPU (the interpreter, which runs programs one by one) a handful."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def hopper_kernels(device: torch.device, name: str) -> ModuleType | None:
    """A module of this package's kernels for Hopper, on such a GPU and with a Triton that has Gluon."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    try:
        return import_module(f"trine.kernels.triton.{name}")
    except ImportError:
        return None


@triton.jit
def wait_for_inputs(early: tl.constexpr):
    """With `early`, let the next kernel's programs be placed, and wait until the kernel before this one is done.

    Every kernel launched with `early_launch` calls it before it reads what others write, or writes anything: by
    induction, then, all earlier kernels are done. Weights may be read before it, and so may what a step's inputs hold
    (lengths, positions, block tables): a model's first kernel, `embedding`, starts when they are complete.
    """
    if early:
        gdc_launch_dependents()
        gdc_wait()


@cache
def early_launch(device: torch.device) -> dict[str, Any]:
    """Launch options for programmatic dependent launch, from Hopper on: a kernel's programs are placed while the one
    before it is still running, which hides a launch of about a microsecond.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"early": False}
    return {"early": True, "launch_pdl": True}


def sequences_block(num_sequences: int) -> int:
    """A power of two not below `num_sequences`: kernels that scan sequences compile for each of a few, in seconds."""
    block = 16 if num_sequences <= 16 else 256
    while block < num_sequences:
        block *= 4
    return block


# Triton's own two are made for use inside of kernels as well, and take microseconds: there are many at every launch.


def cdiv(a: int, b: int) -> int:
    """The quotient a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two not below n, from 1 on."""
    return 1 << max(n - 1, 0).bit_length()
