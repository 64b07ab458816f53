"""An engine in a process of its own: one JSON object a line in each direction (see worker.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).resolve().parent / "worker.py"


class EngineUnavailableError(Exception):
    """The engine is not installed, or can't run this model."""


def interpreter(name: str, given: dict[str, str], peers_dir: Path) -> str:
    """The Python that has the engine."""
    variable = os.environ.get(f"TRINE_PEER_{name.upper()}_PYTHON")
    own = peers_dir / f"v-{name.replace('_', '')}" / "bin" / "python"
    return given.get(name) or variable or (str(own) if own.exists() else sys.executable)


class EngineProcess:
    """Starts the engine and waits until it has loaded. `info`: version, device, ready_s (from start to first token)."""

    def __init__(self, name: str, python: str, settings: dict[str, Any]) -> None:
        environment = dict(os.environ)
        if settings["threads"]:
            environment["OMP_NUM_THREADS"] = str(settings["threads"])
        self._process = subprocess.Popen(
            [python, str(WORKER), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if not os.environ.get("TRINE_BENCH_VERBOSE") else None,
            text=True,
            env=environment,
        )
        self.name = name
        self.info = self.ask("load", settings=settings)

    def generate(self, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        """Seconds that the engine took, by its own clock, and the tokens of each answer."""
        answer = self.ask("generate", prompts=prompts, new=new)
        return answer["seconds"], answer["tokens"]

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """One command and its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: its last words are below
        line = self._process.stdout.readline()
        if not line:
            words = (self._process.communicate()[1] or "").strip().splitlines()
            raise EngineUnavailableError(words[-1] if words else f"its process ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineUnavailableError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process; idempotent."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
