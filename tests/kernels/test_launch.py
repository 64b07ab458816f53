"""Recording launches instead of doing them."""

from __future__ import annotations

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
    with recording(Recorder(torch.device(DEVICE))):
        assert not norm(torch.float32, 2).any()
    assert norm(torch.float32, 2).eq(1).all()


def test_launches_count_again_after_an_error() -> None:
    with pytest.raises(ValueError, match="residual"), recording(Recorder(torch.device(DEVICE))):
        kernels.add_rms_norm(torch.ones(1, 64), torch.ones(2, 64), torch.ones(64), 1e-6)
    assert norm(torch.float32, 2).eq(1).all()


def test_each_variant_is_noted_once() -> None:
    recorder = Recorder(torch.device(DEVICE))
    with recording(recorder):
        norm(torch.float32, 2)
        norm(torch.float32, 7)
        assert len(recorder.variants) == 1
        norm(torch.float16, 2)
        assert len(recorder.variants) == 2
        norm(torch.float16, 2, offset=1)  # not aligned to 16 bytes
        assert len(recorder.variants) == 3
    held = [arg for _, _, args, _ in recorder.variants.values() for arg in args if isinstance(arg, torch.Tensor)]
    aligned = [arg for arg in held if arg.data_ptr() % 16 == 0]
    assert all(arg.device.type == "meta" for arg in aligned), "a recorder holds no memory"
