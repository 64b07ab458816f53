"""What the machine itself is doing: processor, memory, and GPUs where there are some."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STAT, _MEMORY = Path("/proc/stat"), Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class Sample:
    """A metric and its values by rendered labels."""

    name: str
    help: str
    kind: str
    values: list[tuple[str, float]]


class HostMetrics:
    """Utilization is that since the last call."""

    def __init__(self) -> None:
        self._times = _processor_times()
        self._gpus = _gpu_handles()

    def samples(self) -> Iterator[Sample]:
        yield from self._processor()
        yield from _memory()
        yield from _pinned_memory()
        yield from _gpu_samples(self._gpus)

    def _processor(self) -> Iterator[Sample]:
        times = _processor_times()
        if times is None or self._times is None:
            return
        busy, total = times[0] - self._times[0], times[1] - self._times[1]
        self._times = times
        share = busy / total if total else 0.0
        yield Sample("nv_cpu_utilization", "CPU utilization rate [0.0 - 1.0]", "gauge", [("", round(share, 6))])


def _processor_times() -> tuple[int, int] | None:
    """Busy and total time of all processors since boot, in ticks; None where the system does not tell."""
    try:
        fields = [int(field) for field in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    total = sum(fields)
    return total - fields[3] - fields[4], total  # idle and waiting for devices are not busy


def _memory() -> Iterator[Sample]:
    try:
        lines = _MEMORY.read_text().splitlines()
        kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        total, available = kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024
    except (OSError, ValueError, KeyError, IndexError):
        return
    yield Sample("nv_cpu_memory_total_bytes", "CPU total memory (RAM), in bytes", "gauge", [("", total)])
    used = [("", float(total - available))]
    yield Sample("nv_cpu_memory_used_bytes", "CPU used memory (RAM), in bytes", "gauge", used)


def _pinned_memory() -> Iterator[Sample]:
    """Tensors are not copied through a pool of pinned memory: its size is zero."""
    yield Sample(
        "nv_pinned_memory_pool_total_bytes", "Pinned memory pool total memory size, in bytes", "gauge", [("", 0)]
    )
    yield Sample(
        "nv_pinned_memory_pool_used_bytes", "Pinned memory pool used memory size, in bytes", "gauge", [("", 0)]
    )


def _gpu_handles() -> tuple[Any, list[tuple[str, Any]]] | None:
    """NVML and each GPU's label and handle; None where there is no GPU, or no package pynvml."""
    try:
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return pynvml, [(f'{{gpu_uuid="{_text(pynvml.nvmlDeviceGetUUID(handle))}"}}', handle) for handle in handles]
    except Exception:  # the package is missing, or has no driver to talk to
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _gpu_samples(found: tuple[Any, list[tuple[str, Any]]] | None) -> Iterator[Sample]:
    if found is None or not found[1]:
        return
    nvml, handles = found
    metrics: tuple[tuple[str, str, str, Callable[[Any], float]], ...] = (
        (
            "nv_gpu_utilization",
            "GPU utilization rate [0.0 - 1.0)",
            "gauge",
            lambda handle: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        ),
        (
            "nv_gpu_memory_total_bytes",
            "GPU total memory, in bytes",
            "gauge",
            lambda handle: nvml.nvmlDeviceGetMemoryInfo(handle).total,
        ),
        (
            "nv_gpu_memory_used_bytes",
            "GPU used memory, in bytes",
            "gauge",
            lambda handle: nvml.nvmlDeviceGetMemoryInfo(handle).used,
        ),
        (
            "nv_gpu_power_usage",
            "GPU power usage in watts",
            "gauge",
            lambda handle: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        ),
        (
            "nv_gpu_power_limit",
            "GPU power management limit in watts",
            "gauge",
            lambda handle: nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000,
        ),
        (
            "nv_energy_consumption",
            "GPU energy consumption in joules since the driver was loaded",
            "counter",
            lambda handle: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000,
        ),
    )
    for name, help_text, kind, read in metrics:
        values = []
        for labels, handle in handles:
            try:
                values.append((labels, read(handle)))
            except Exception:  # not every GPU tells everything
                continue
        if values:
            yield Sample(name, help_text, kind, values)
