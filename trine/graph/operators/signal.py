"""Fourier transforms, windows, filter banks."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from trine.graph.dtypes import from_onnx
from trine.graph.operators.registry import operator
from trine.graph.operators.room import room_for


@operator("DFT")
def dft(
    x: Tensor,
    dft_length: Tensor | None = None,
    axis: Tensor | None = None,
    *,
    inverse: int = 0,
    onesided: int = 0,
) -> Tensor:
    """Real [..., 1] or complex [..., 2] numbers along `axis` (the last but one); `onesided` keeps half of a real one's.

    A one-sided inverse takes that half, and gives real numbers [..., 1].
    """
    along = (-2 if axis is None else int(axis)) % x.dim()
    dtype = x.dtype
    wide = x.float() if dtype in (torch.float16, torch.bfloat16) else x
    imaginary = wide[..., 1] if x.shape[-1] == 2 else torch.zeros_like(wide[..., 0])
    signal = torch.complex(wide[..., 0].contiguous(), imaginary.contiguous()).numpy()
    if inverse and onesided:
        length = 2 * (x.shape[along] - 1) if dft_length is None else int(dft_length)
        return torch.from_numpy(np.fft.irfft(signal, length, along)).unsqueeze(-1).to(dtype)
    length = x.shape[along] if dft_length is None else int(dft_length)
    y = torch.from_numpy((np.fft.ifft if inverse else np.fft.fft)(signal, length, along))
    if onesided:
        y = y.narrow(along, 0, length // 2 + 1)
    return torch.view_as_real(y).to(dtype)


@operator("STFT")
def stft(
    x: Tensor,
    frame_step: Tensor,
    window: Tensor | None = None,
    frame_length: Tensor | None = None,
    *,
    onesided: int = 1,
) -> Tensor:
    """x [B, T] or [B, T, 1 or 2] in frames: [B, frames, bins, 2]."""
    signal = x.unsqueeze(-1) if x.dim() == 2 else x
    if frame_length is None and window is None:
        raise ValueError("STFT needs a window or frame_length")
    length = int(frame_length) if frame_length is not None else window.shape[0]  # type: ignore[union-attr]
    frames = signal.unfold(1, length, int(frame_step))  # [B, frames, components, length]
    if window is not None:
        frames = frames * window
    return dft(frames.transpose(2, 3), None, torch.tensor(2), onesided=onesided)


def _window(size: Tensor, periodic: int, output_datatype: int, terms: tuple[float, ...]) -> Tensor:
    count = int(size)
    room_for([count], torch.float64)
    kind = from_onnx(output_datatype)
    if kind is None:
        raise TypeError(f"a window of ONNX type {output_datatype} is not supported")
    angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / (count if periodic else max(count - 1, 1)))
    total = sum((-1) ** i * term * torch.cos(i * angle) for i, term in enumerate(terms))
    return torch.as_tensor(total).to(kind.torch)


@operator("HannWindow")
def hann_window(size: Tensor, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    return _window(size, periodic, output_datatype, (0.5, 0.5))


@operator("HammingWindow")
def hamming_window(size: Tensor, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    return _window(size, periodic, output_datatype, (25 / 46, 21 / 46))


@operator("BlackmanWindow")
def blackman_window(size: Tensor, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    return _window(size, periodic, output_datatype, (0.42, 0.5, 0.08))


@operator("MelWeightMatrix")
def mel_weight_matrix(
    num_mel_bins: Tensor,
    dft_length: Tensor,
    sample_rate: Tensor,
    lower_edge_hertz: Tensor,
    upper_edge_hertz: Tensor,
    *,
    output_datatype: int = 1,
) -> Tensor:
    """[bins of a spectrum, mel bins]: triangles between neighbouring mel frequencies, rounded to spectrum bins."""
    kind = from_onnx(output_datatype)
    if kind is None:
        raise TypeError(f"MelWeightMatrix of ONNX type {output_datatype} is not supported")
    bins, length, rate = int(num_mel_bins), int(dft_length), int(sample_rate)
    low, high = (2595 * np.log10(1 + float(edge) / 700) for edge in (lower_edge_hertz, upper_edge_hertz))
    mels = low + np.arange(bins + 2) * ((high - low) / (bins + 2))
    places = (((length + 1) * (700 * (10 ** (mels / 2595) - 1))) // rate).astype(int)
    spectrum = length // 2 + 1
    matrix = np.zeros((spectrum, bins))
    for i in range(bins):
        first, peak, last = places[i : i + 3]
        if peak == first:
            matrix[peak, i] = 1
        else:
            matrix[first : peak + 1, i] = np.arange(peak - first + 1) / (peak - first)
        if last != peak:
            matrix[peak:last, i] = (last - np.arange(peak, last)) / (last - peak)
    return torch.from_numpy(matrix).to(kind.torch)
