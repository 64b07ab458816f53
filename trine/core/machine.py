"""What this machine, or the container on it, has."""

from __future__ import annotations

from pathlib import Path


def memory_bytes() -> tuple[int, int]:
    """Main memory in all and what can be taken now, within the control group's limit if there is one; 0: not known."""
    facts = {
        line.partition(":")[0]: int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if len(line.split()) > 1
    }
    total, available = facts.get("MemTotal", 0), facts.get("MemAvailable", 0)
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0].isdigit():
        total = min(total, int(limit[0]))
        available = min(available, total - int(used[0]))
    return total, available


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
