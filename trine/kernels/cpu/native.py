"""The native library: finding it, loading it, the signatures of its functions."""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

PATH = Path(__file__).with_name("_native.so")
VERSION = 1  # of the C interface, csrc/api.cpp

_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "trine_version": (c_int, []),
    "trine_isa": (c_char_p, []),
    "trine_set_isa": (c_int, [c_char_p]),
    "trine_set_num_threads": (None, [c_int]),
    "trine_num_threads": (c_int, []),
    "trine_weight_new": (c_void_p, [c_int64, c_int64, c_int, c_int64]),
    "trine_weight_delete": (None, [c_void_p]),
    "trine_weight_pack": (None, [c_void_p, c_void_p, c_int]),
    "trine_weight_bytes": (c_int64, [c_void_p]),
    "trine_linear": (None, [c_void_p] * 4 + [c_int64] * 2 + [c_int] * 3),
    "trine_decoder": (None, [c_void_p]),
    "trine_step_find": (c_int, [c_char_p, c_void_p]),
    "trine_tape_run": (c_int64, [c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p]),
    "trine_pages_new": (c_void_p, [c_int64]),
    "trine_pages_delete": (None, [c_void_p, c_int64]),
    "trine_embedding": (c_int, [c_void_p] * 3 + [c_int64, c_int]),
    "trine_norm": (None, [c_void_p] * 5 + [c_int64] * 2 + [c_float, c_int]),
    "trine_silu_mul": (None, [c_void_p] * 2 + [c_int64] * 2 + [c_int]),
    "trine_gelu": (None, [c_void_p] * 2 + [c_int64, c_int, c_int]),
    "trine_sample": (None, [c_void_p] * 3 + [c_int64] * 3),
    "trine_score": (None, [c_void_p] * 6 + [c_int64] * 4),
    "trine_penalise": (None, [*[c_void_p] * 5, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int64]),
    "trine_count_tokens": (None, [*[c_void_p] * 5, c_int64, c_int64, c_void_p]),
    "trine_probe_read": (c_float, [c_void_p, c_int64]),
    "trine_probe_fma": (c_int64, [c_int64, c_int64]),
    "trine_prepare_qkv": (None, [c_void_p] * 9 + [c_int64] * 6 + [c_float, c_int, c_int]),
    "trine_attention": (None, [c_void_p] * 7 + [c_int64] * 7 + [c_float, c_int, c_int]),
}


@cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None, and in words what there is or why there is nothing."""
    if not PATH.exists():
        return None, (
            f"not built: {PATH.name} is missing; reinstall with `pip install --force-reinstall --no-deps trine`, or in "
            "a checkout run `pip install ziglang && python setup.py build_ext --inplace`"
        )
    try:
        library = ctypes.CDLL(str(PATH))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype = result
            function.argtypes = arguments
    except (OSError, AttributeError) as error:
        return None, f"{PATH.name} can't be loaded ({error}); rebuild it: `python setup.py build_ext --inplace`"
    if library.trine_version() != VERSION:
        return None, f"{PATH.name} is of another version; rebuild it: `python setup.py build_ext --inplace`"
    if library.trine_isa() is None:
        return None, "this processor has no AVX2 and FMA; the reference kernels serve, slowly"
    library.trine_set_num_threads(default_threads())
    return library, f"{library.trine_isa().decode()}, {library.trine_num_threads()} threads"


def default_threads() -> int:
    """The processors that this process may use, by its affinity and its control group's quota."""
    count = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        pass
    return count
