"""Repetition, presence and frequency penalties, worked out on the tokens that a sequence holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trine.kernels import cpu, ops, reference
from trine.llm.sampling.upload import upload


class PenaltyTable:
    """The distinct tokens of each penalised row and how often the output has them, on the device.

    A table of the vocabulary's width would cost 150,000 entries a row and step; a sequence holds a few thousand
    distinct tokens at most. Prompt tokens are entered only when the repetition penalty needs them. Sizes are known
    exactly on the device only, where sampled tokens are looked up and appended without the host's knowledge; the host
    keeps an upper bound of each to know how wide the work must be.

    ids [rows, capacity] int64 and occurrences [rows, capacity] float32, of which row r's entries are the first
    sizes[r] (int64); strengths [rows, 3] float32: repetition, presence and frequency penalty.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._device = device
        self.ids = torch.zeros((max_rows, 0), dtype=torch.int64, device=device)
        self.occurrences = torch.zeros((max_rows, 0), dtype=torch.float32, device=device)
        self.sizes = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.strengths = torch.zeros((max_rows, 3), dtype=torch.float32, device=device)
        self._bounds = np.zeros(max_rows, dtype=np.int64)

    def set_row(
        self,
        row: int,
        repetition: float,
        presence: float,
        frequency: float,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
    ) -> None:
        output, occurrences = np.unique(np.asarray(output_token_ids, dtype=np.int64), return_counts=True)
        tokens, counts = output, occurrences
        if repetition != 1.0:
            only_prompt = np.setdiff1d(np.asarray(prompt_token_ids, dtype=np.int64), output)
            tokens = np.concatenate((output, only_prompt))
            counts = np.concatenate((occurrences, np.zeros_like(only_prompt)))
        size = len(tokens)
        self._reserve(size + 1)
        self.ids[row, :size] = upload(tokens, self._device)
        self.occurrences[row, :size] = upload(counts, self._device, torch.float32)
        self.sizes[row] = size
        self._bounds[row] = size
        self.strengths[row] = upload((repetition, presence, frequency), self._device, torch.float32)

    def apply(self, logits: Tensor, lines: Tensor, rows: Tensor, host_rows: npt.NDArray[np.int64]) -> None:
        """Penalise lines `lines` [P] of logits [B, V] in place; `rows` [P] are their rows."""
        if self._is_native():
            cpu.penalise(self, rows, logits, lines)
            return
        width = max(1, int(self._bounds[host_rows].max()))
        self._reserve(width)
        sizes = self.sizes[rows][:, None]
        place = torch.arange(width, device=self._device)
        # Entries past the end repeat the first one, so that every write to a token writes the same value.
        place = torch.where(place < sizes, place, 0)
        ids = self.ids[rows, :width].gather(1, place)
        counts = self.occurrences[rows, :width].gather(1, place)
        repetition, presence, frequency = self.strengths[rows][:, :, None].unbind(1)
        old = logits[lines[:, None], ids]
        new = torch.where(old > 0, old / repetition, old * repetition)
        new = new - presence * (counts > 0) - frequency * counts
        logits[lines[:, None], ids] = torch.where(sizes > 0, new, old)

    def record(self, tokens: Tensor, rows: Tensor, host_rows: npt.NDArray[np.int64]) -> None:
        """Count the sampled `tokens` [P] int64 of `rows` [P]."""
        width = int(self._bounds[host_rows].max()) + 1
        self._reserve(width)
        self._bounds[host_rows] += 1
        if self._is_native():
            cpu.count_tokens(self, rows, tokens)
            return
        sizes = self.sizes[rows]
        known = (self.ids[rows, :width] == tokens[:, None]) & (
            torch.arange(width, device=self._device) < sizes[:, None]
        )
        found = known.any(-1)
        place = torch.where(found, known.to(torch.int8).argmax(-1), sizes)
        counts = torch.where(found, self.occurrences[rows, place], 0.0) + 1.0
        self.ids[rows, place] = tokens
        self.occurrences[rows, place] = counts
        self.sizes[rows] = sizes + ~found

    def _is_native(self) -> bool:
        return self._device.type == "cpu" and ops.backend(False, torch.float32) is not reference

    def _reserve(self, width: int) -> None:
        """Make room for `width` entries a row."""
        have = self.ids.shape[1]
        if width <= have:
            return
        grown = max(256, 1 << (width - 1).bit_length())
        self.ids = torch.nn.functional.pad(self.ids, (0, grown - have))
        self.occurrences = torch.nn.functional.pad(self.occurrences, (0, grown - have))
