"""Chooses the next token of every row of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trine.kernels import ops, reference
from trine.llm.sampling import distribution
from trine.llm.sampling.edits import LogitEdits
from trine.llm.sampling.logprobs import SampledLogprobs, prompt_logprobs
from trine.llm.sampling.params import SamplingParams
from trine.llm.sampling.random import as_uint64, uniforms
from trine.llm.sampling.upload import upload

# What a row needs beyond the largest logit: bits, since a step asks for each of them over all rows.
_RANDOM, _TOP_K, _TOP_P, _MIN_P, _EDITS, _GUIDED, _LOGPROBS = (1 << bit for bit in range(7))
_FILTERS = _TOP_K | _TOP_P | _MIN_P


@dataclass(slots=True)
class SamplerOutput:
    """tokens [B] int64 on the logits' device; -1 where the row's logits hold NaN or infinity, or allow no token at all.

    The caller fails the requests of rows with -1; `next_input` is safe to embed meanwhile.
    """

    tokens: Tensor
    logprobs: SampledLogprobs | None

    @property
    def next_input(self) -> Tensor:
        return self.tokens.clamp(min=0)


class Sampler:
    """Sampling parameters and penalty state of up to `max_rows` running sequences, and the choice of their next tokens.

    Calls must be made in the order of the steps and from one thread at a time. `sample` never waits for the
    device, so it can be launched ahead of the host.
    """

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device | str) -> None:
        if not 0 < vocab_size <= distribution.MAX_VOCABULARY:
            raise ValueError(f"vocab_size={vocab_size}: must be from 1 to {distribution.MAX_VOCABULARY}")
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._uses = np.zeros(max_rows, dtype=np.uint8)
        self._seeds = np.zeros(max_rows, dtype=np.uint64)
        # Columns: temperature (0 is greedy), top_k, top_p, log(min_p). Float64 holds a top_k exactly.
        self._filters = np.zeros((max_rows, 4), dtype=np.float64)
        self._logprob_counts = np.zeros(max_rows, dtype=np.int64)
        self._edits = LogitEdits(max_rows, vocab_size, self.device)

    def set_row(
        self,
        row: int,
        params: SamplingParams,
        *,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        eos_token_ids: Sequence[int],
        bad_words_token_ids: Sequence[Sequence[int]],
        seed: int,
    ) -> None:
        """Give `row` to a sequence. output_token_ids is non-empty when a preempted sequence resumes."""
        uses = 0
        top_k = params.top_k if params.top_k < self.vocab_size else 0
        if not params.greedy and top_k != 1:
            uses |= _RANDOM
            uses |= _TOP_K if top_k else 0
            uses |= _TOP_P if params.top_p < 1.0 else 0
            uses |= _MIN_P if params.min_p > 0.0 else 0
        if params.logprobs is not None:
            uses |= _LOGPROBS
        if params.guided is not None:
            uses |= _GUIDED
        if self._edits.set_row(row, params, prompt_token_ids, output_token_ids, eos_token_ids, bad_words_token_ids):
            uses |= _EDITS
        self._uses[row] = uses
        self._seeds[row] = as_uint64(seed)
        min_z = math.log(params.min_p) if params.min_p > 0.0 else -math.inf
        self._filters[row] = (params.temperature if uses & _RANDOM else 0.0, top_k, params.top_p, min_z)
        self._logprob_counts[row] = params.logprobs or 0

    def clear_row(self, row: int) -> None:
        """Take `row` from its sequence and free what its options held."""
        if self._uses[row] & _EDITS:
            self._edits.clear_row(row)
        self._uses[row] = 0

    def is_plain(self, rows: Sequence[int]) -> bool:
        """Whether all of these rows take the first token with the largest logit, and want nothing else."""
        return not self._uses[rows].any()

    def sample(
        self, logits: Tensor, rows: Sequence[int], steps: Sequence[int], bitmask: Tensor | None = None
    ) -> SamplerOutput:
        """One token a row. logits [B, V] float32 is overwritten when a row changes its logits.

        rows [B]: the row of each line of logits. steps [B]: the index of the output token it samples, 0 for the first.
        bitmask [B, ceil(V / 32)] int32: bit i % 32 of word i // 32 allows token i; read for rows whose parameters are
        guided only.
        """
        index = np.asarray(rows, dtype=np.int64)
        uses = self._uses[index]
        anyone = int(np.bitwise_or.reduce(uses)) if len(index) else 0
        raw = self._raw_logits(logits, uses, anyone, copy=bool(anyone & (_EDITS | _GUIDED)))
        if anyone & (_EDITS | _GUIDED):
            guided = uses & _GUIDED != 0 if bitmask is not None else None
            self._edits.apply(logits, index, np.asarray(steps), bitmask, guided)
        tokens = self._choose(logits, index, uses, np.asarray(steps))
        if anyone & _EDITS:
            self._edits.record(index, tokens)
        return SamplerOutput(tokens, self._logprobs(raw, uses, index, tokens) if raw is not None else None)

    def _raw_logits(self, logits: Tensor, uses: npt.NDArray[np.uint8], anyone: int, copy: bool) -> Tensor | None:
        """The unedited logits of the rows that want log-probabilities."""
        if not anyone & _LOGPROBS:
            return None
        wanted = np.flatnonzero(uses & _LOGPROBS)
        if len(wanted) == len(uses):
            return logits.clone() if copy else logits
        return logits.index_select(0, upload(wanted, self.device))

    def _logprobs(
        self, raw: Tensor, uses: npt.NDArray[np.uint8], index: npt.NDArray[np.int64], tokens: Tensor
    ) -> SampledLogprobs:
        count = int(self._logprob_counts[index].max())
        if raw.shape[0] == len(index):
            return prompt_logprobs(raw, tokens, count)
        wanted = upload(np.flatnonzero(uses & _LOGPROBS), self.device)
        part = prompt_logprobs(raw, tokens.index_select(0, wanted), count)
        result = SampledLogprobs.empty(len(index), part.top_ids.shape[1], self.device)
        result.put(wanted, part)
        return result

    def _choose(
        self,
        logits: Tensor,
        index: npt.NDArray[np.int64],
        uses: npt.NDArray[np.uint8],
        steps: npt.NDArray[np.int64],
    ) -> Tensor:
        """The tokens of the edited logits, [B] int64: -1 where the row's largest logit is not finite."""
        random = uses & _RANDOM != 0
        table = np.zeros((len(index), 5))
        table[:, 3:] = (1.0, -math.inf)
        if random.any():
            table[:, 0] = uniforms(self._seeds[index], steps.astype(np.uint64))
            table[:, 1:] = self._filters[index]
        if self.device.type == "cpu" and ops.backend(False, torch.float32) is not reference:
            from trine.kernels import cpu

            return cpu.sample(logits, torch.from_numpy(table))
        largest, tokens = distribution.argmax(logits)
        for part in np.flatnonzero(random & (uses & _FILTERS == 0)), np.flatnonzero(uses & _FILTERS):
            if len(part) == 0:
                continue
            lines = upload(part, self.device)
            chosen = logits if len(part) == len(index) else logits[lines]
            needs = int(np.bitwise_or.reduce(uses[part]))
            tokens.index_copy_(0, lines, _draw(chosen, largest[lines], upload(table[part], self.device), needs))
        return tokens.masked_fill_(largest - largest != 0.0, -1)  # infinity and NaN give NaN


def _draw(logits: Tensor, largest: Tensor, table: Tensor, needs: int) -> Tensor:
    """Draw one token a row, [B] int64. table [B, 5] float64: uniform number, temperature, top_k, top_p, log(min_p)."""
    uniform, temperature, top_k, top_p, min_z = table.unbind(1)
    z = distribution.scaled_logits(logits, largest, temperature.to(torch.float32))
    mass = distribution.weights(z)
    if needs & _FILTERS:
        limit = distribution.thresholds(
            z,
            top_k.to(torch.int64) if needs & _TOP_K else None,
            top_p if needs & _TOP_P else None,
            min_z if needs & _MIN_P else None,
        )
        mass.masked_fill_(z < limit, 0.0)
    return distribution.draw(mass, uniform)
