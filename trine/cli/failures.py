"""One line, with the remedy, for each failure that is not a fault of the program."""

from __future__ import annotations

import errno
import re

from trine.core.errors import TrineError

_LESS_MEMORY = "lower --max-model-len, --max-num-seqs or --cache-memory, or use --dtype bfloat16 or --quantization int8"


def explain(error: Exception) -> str | None:
    """What to tell the user; None for an error that nobody foresaw, which deserves its traceback."""
    if isinstance(error, TrineError):
        return one_line(error.message)
    if is_out_of_memory(error):
        return f"out of memory: {one_line(str(error)) or 'an allocation failed'}; {_LESS_MEMORY}"
    if isinstance(error, ModuleNotFoundError) and error.name is not None and not error.name.startswith("trine"):
        return missing_module(error.name)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        remedy = _OS_REMEDIES.get(error.errno or 0, "")
        return f"{where}{error.strerror}{remedy}"
    return None


_OS_REMEDIES = {
    errno.ENOSPC: ": free space on that disk, or set HF_HOME to a directory on another",
    errno.EACCES: ": choose a path that you may read and write",
    errno.EMFILE: ": raise the limit with `ulimit -n 65536`",
}

_EXTRAS = {
    "server": (
        "uvicorn",
        "uvloop",
        "httptools",
        "msgspec",
        "prometheus_client",
        "google",
        "hpack",
        "onnxruntime",
        "fsspec",
    ),
    "openvino": ("openvino",),
    "guided": ("llguidance", "xgrammar"),
    "graph": ("onnx", "ml_dtypes"),
    "gpu": ("triton",),
}


def missing_module(name: str) -> str:
    """Which extra of the package, or which package, has the module."""
    top = name.partition(".")[0]
    for extra, modules in _EXTRAS.items():
        if top in modules:
            return f"the Python module {top} is not installed: pip install 'trine[{extra}]'"
    return f"the Python module {top} is not installed: pip install {top}"


def is_out_of_memory(error: Exception) -> bool:
    """Python's, or torch's on a CPU (a RuntimeError of its allocator) or a GPU (a class of its own)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return (
        isinstance(error, RuntimeError)
        and re.search(r"DefaultCPUAllocator|can't allocate memory", str(error)) is not None
    )


def one_line(text: str) -> str:
    return " ".join(text.split())
