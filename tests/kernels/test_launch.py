"""Recording launches instead of doing them, and compiling what they need."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from trine.kernels import triton as kernels
from trine.kernels.triton.launch import Recorder, recording

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def norm(dtype: torch.dtype, rows: int, offset: int = 0) -> torch.Tensor:
    """The residual stream after an addition of ones to zeros."""
    x = torch.ones(rows * 64 + offset, dtype=dtype, device=DEVICE)[offset:].view(rows, 64)
    residual = torch.zeros(rows, 64, dtype=dtype, device=DEVICE)
    kernels.add_rms_norm(x, residual, torch.ones(64, dtype=dtype, device=DEVICE), 1e-6)
    return residual


def test_what_is_recorded_is_not_launched() -> None:
    with recording(Recorder()):
        assert not norm(torch.float32, 2).any()
    assert norm(torch.float32, 2).eq(1).all()


def test_launches_count_again_after_an_error() -> None:
    with pytest.raises(ValueError, match="residual"), recording(Recorder()):
        kernels.add_rms_norm(torch.ones(1, 64), torch.ones(2, 64), torch.ones(64), 1e-6)
    assert norm(torch.float32, 2).eq(1).all()


def test_each_variant_is_noted_once() -> None:
    recorder = Recorder()
    with recording(recorder):
        norm(torch.float32, 2)
        norm(torch.float32, 7)
        assert len(recorder.variants) == 1
        norm(torch.float16, 2)
        assert len(recorder.variants) == 2
        norm(torch.float16, 2, offset=1)  # not aligned to 16 bytes
        assert len(recorder.variants) == 3
    held = [arg for _, _, args, _ in recorder.variants.values() for arg in args if isinstance(arg, torch.Tensor)]
    assert all(arg.device.type == "meta" for arg in held), "a recorder holds no memory"
    assert {arg.data_ptr() % 16 for arg in held} == {0, 2}


@pytest.fixture(scope="module")
def ahead(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `tests.kernels.ahead` printed, by case; under "log" what it said besides."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))
    command = [sys.executable, "-m", "tests.kernels.ahead"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr  # its own, at its end
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    return {"log": {"text": done.stderr}, **{case["case"]: case for case in cases}}


def test_processes_compile_what_a_launch_will_ask_for(ahead: dict[str, dict[str, Any]]) -> None:
    assert ahead["compiled"]["found"] == [True] * 7
    assert not ahead["compiled"]["children"]


def test_what_a_process_did_not_compile_is_compiled_here(ahead: dict[str, dict[str, Any]]) -> None:
    assert sorted(ahead["one killed"]["found"]) == [False] + [True] * 5
    assert ahead["all killed"]["found"] == [False] * 6
    assert not ahead["one killed"]["children"] + ahead["all killed"]["children"]
    assert ahead["log"]["text"].count("could not be compiled by processes") == 2


def test_closing_ends_the_processes(ahead: dict[str, dict[str, Any]]) -> None:
    assert ahead["closed"]["found"] == []
    assert ahead["closed"]["children"] == []


def test_processes_end_when_their_parent_does(ahead: dict[str, dict[str, Any]]) -> None:
    left = ahead["orphaned"]["left"]
    assert len(left) == 2
    while any(_is_running(pid) for pid in left):
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    """Not of a process that ended and whose new parent has not asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
