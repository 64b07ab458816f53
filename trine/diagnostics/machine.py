"""The machine: processor, memory, disk, GPUs, versions, ports. Nothing here needs torch to be sound, or installed."""

from __future__ import annotations

import ctypes
import errno
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import trine
from trine.core.machine import memory_bytes
from trine.core.sizes import format_bytes
from trine.diagnostics.findings import Finding

_ISA_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
_LEAST_FREE_DISK = 5 << 30

PACKAGES: dict[str, tuple[str, ...]] = {
    "core": ("torch", "numpy", "safetensors", "tokenizers", "huggingface-hub", "jinja2", "tqdm"),
    "server": (
        "uvicorn",
        "uvloop",
        "httptools",
        "msgspec",
        "prometheus-client",
        "protobuf",
        "hpack",
        "onnxruntime",
        "fsspec",
    ),
    "guided": ("llguidance",),
}
"""What each part of Trine needs: `core` always, the others by the extra of the same name."""


def examine_machine(port: int) -> Iterator[Finding]:
    yield from _system()
    yield from _memory()
    yield from _disk()
    yield from _packages()
    yield from _torch()
    yield _kernels()
    yield from _gpus()
    yield examine_port("127.0.0.1", port)


def _system() -> Iterator[Finding]:
    yield Finding(
        "machine",
        "system",
        "ok",
        f"{_distribution()}, {platform.machine()}, Linux {platform.release()}"
        if sys.platform == "linux"
        else f"{platform.platform()}",
    )
    flags = cpu_flags()
    known = [flag for flag in _ISA_FLAGS if flag in flags]
    extensions = " ".join(known) or "no vector extensions known"
    detail = f"{_cpu_name()}, {usable_cpus()} of {os.cpu_count()} cores usable, {extensions}"
    if platform.machine() == "x86_64" and flags and not {"avx2", "fma"} <= flags:
        yield Finding(
            "machine",
            "processor",
            "warning",
            detail,
            "the native kernels need AVX2 and FMA: use another machine, or be patient",
        )
    else:
        yield Finding("machine", "processor", "ok", detail)


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "Linux"


def _cpu_name() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def cpu_flags() -> set[str]:
    """The processor's feature flags as Linux names them; empty elsewhere."""
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _memory() -> Iterator[Finding]:
    total, available = memory_bytes()
    if total == 0:
        yield Finding("machine", "memory", "note", "unknown: /proc/meminfo can't be read")
        return
    detail = f"{format_bytes(available)} of {format_bytes(total)} available"
    if available < 1 << 30:
        yield Finding("machine", "memory", "warning", detail, "stop other programs: even a small model wants 1 GiB")
    else:
        yield Finding("machine", "memory", "ok", detail)


def hub_cache() -> Path:
    """Where the hub client keeps what it downloads."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def _disk() -> Iterator[Finding]:
    place = hub_cache()
    existing = next(path for path in (place, *place.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{format_bytes(free)} free for downloaded models ({place})"
    if free < _LEAST_FREE_DISK:
        yield Finding(
            "machine", "disk", "warning", detail, "free some space, or set HF_HOME to a directory on another disk"
        )
    elif not os.access(existing, os.W_OK):
        yield Finding(
            "machine", "disk", "warning", f"{existing} can't be written", "set HF_HOME to a directory that can"
        )
    else:
        yield Finding("machine", "disk", "ok", detail)


def _packages() -> Iterator[Finding]:
    yield Finding(
        "software", "python", "ok", f"{platform.python_version()} ({sys.executable}), trine {trine.__version__}"
    )
    for part, names in PACKAGES.items():
        versions = {name: package_version(name) for name in names}
        missing = [name for name, version in versions.items() if version is None]
        detail = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        if not missing:
            yield Finding("software", part, "ok", detail)
        elif part == "core":
            yield Finding("software", part, "problem", f"missing: {', '.join(missing)}", "pip install trine")
        else:
            yield Finding("software", part, "warning", f"missing: {', '.join(missing)}", f"pip install 'trine[{part}]'")


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("software", "torch", "problem", f"can't be imported: {error}", "pip install 'torch>=2.11'")
        return
    version = torch.__version__.partition("+")[0].split(".")
    if tuple(int(part) for part in version[:2]) < (2, 11):
        yield Finding("software", "torch", "problem", f"{torch.__version__} is too old", "pip install 'torch>=2.11'")
    else:
        built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
        yield Finding("software", "torch", "ok", f"{torch.__version__}, built for {built_for}")


def _kernels() -> Finding:
    if os.environ.get("TRINE_KERNELS") == "reference":
        return Finding(
            "software", "CPU kernels", "warning", "TRINE_KERNELS=reference: slow by choice", "unset TRINE_KERNELS"
        )
    try:
        from trine.kernels import cpu
    except ImportError as error:
        return Finding("software", "CPU kernels", "problem", f"can't be imported: {error}", "reinstall trine")
    if cpu.available():
        return Finding("software", "CPU kernels", "ok", f"native, {cpu.status()}")
    return Finding(
        "software",
        "CPU kernels",
        "warning",
        f"the slow reference is used: {cpu.status()}",
        "reinstall trine: its native library is built then",
    )


def _gpus() -> Iterator[Finding]:
    """NVIDIA's driver and torch's view of it: the usual mismatch is a driver older than torch's CUDA."""
    driver = driver_version()
    try:
        import torch
    except ImportError:
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            major, minor = torch.cuda.get_device_capability(index)
            memory = f"{format_bytes(free)} of {format_bytes(total)} free"
            detail = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}, {memory}"
            yield Finding("devices", f"cuda:{index}", "ok", detail)
        if package_version("triton") is None:
            yield Finding(
                "devices",
                "triton",
                "problem",
                "not installed, and the GPU's kernels need it",
                "pip install 'trine[gpu]'",
            )
    elif driver is None:
        yield Finding("devices", "GPU", "note", "no NVIDIA driver here: models run on the CPU")
    elif torch.version.cuda is None:
        yield Finding(
            "devices",
            "GPU",
            "warning",
            f"NVIDIA driver {driver}, but this torch is built for CPUs only",
            "pip install --force-reinstall torch, from an index with CUDA builds (https://pytorch.org/get-started)",
        )
    else:
        yield Finding(
            "devices",
            "GPU",
            "problem",
            f"NVIDIA driver {driver} does not work with torch's CUDA {torch.version.cuda}",
            "update the driver, or install a torch built for an older CUDA; in a container, start it with --gpus all",
        )


def driver_version() -> str | None:
    """The NVIDIA driver's version, or None when there is no driver."""
    for line in _lines("/proc/driver/nvidia/version"):
        words = line.split()
        return next((word for word in words if word[0].isdigit()), "of unknown version")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return "of unknown version"


def examine_port(host: str, port: int) -> Finding:
    """Whether `trine serve` could listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                owner = port_owner(port)
                remedy = (
                    f"stop {owner or 'what listens there'}, or serve on another: trine serve MODEL --port {port + 1}"
                )
                return Finding("network", f"port {port}", "warning", f"in use{f' by {owner}' if owner else ''}", remedy)
            return Finding(
                "network",
                f"port {port}",
                "warning",
                f"can't be used: {error.strerror}",
                "choose one from 1024 on with --port",
            )
    return Finding("network", f"port {port}", "ok", f"free on {host}")


def port_owner(port: int) -> str | None:
    """Command and process id of what listens on a TCP port, as far as /proc shows it to us."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in _lines(table)[1:]:
            fields = line.split()
            if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == "0A":
                inodes.add(f"socket:[{fields[9]}]")
    if not inodes:
        return None
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(handle) in inodes for handle in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
        except OSError:
            continue  # ended meanwhile, or somebody else's
    return None
