"""Changes to logits that only the rows with an option pay for: penalties, biases, forbidden tokens, grammars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trine.llm.sampling.bad_words import BadWords
from trine.llm.sampling.bitmask import unpack_bitmask
from trine.llm.sampling.params import SamplingParams
from trine.llm.sampling.penalties import PenaltyTable
from trine.llm.sampling.upload import upload


@dataclass(slots=True)
class _RowEdits:
    """One row's options. Token ids and values are device tensors, made once when the row is set."""

    penalised: bool
    bias: tuple[Tensor, Tensor] | None
    min_tokens: int
    ends: Tensor | None
    bad_words: BadWords | None

    @property
    def forbids(self) -> bool:
        """Whether the row can be left without a token that its grammar allows."""
        return self.bias is not None or self.ends is not None or self.bad_words is not None


class LogitEdits:
    """Options of up to `max_rows` rows. Nothing is allocated for an option before the first row uses it."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._max_rows = max_rows
        self._vocab_size = vocab_size
        self._device = device
        self._rows: dict[int, _RowEdits] = {}
        self._penalties: PenaltyTable | None = None

    def set_row(
        self,
        row: int,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        eos_token_ids: Sequence[int],
        bad_words_token_ids: Sequence[Sequence[int]],
    ) -> bool:
        """Set the row's options; False if it has none."""
        strengths = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        penalised = strengths != (1.0, 0.0, 0.0)
        if penalised:
            if self._penalties is None:
                self._penalties = PenaltyTable(self._max_rows, self._device)
            self._penalties.set_row(row, *strengths, prompt_token_ids, output_token_ids)
        single = {word[0]: -math.inf for word in bad_words_token_ids if len(word) == 1}
        phrases = [word for word in bad_words_token_ids if len(word) > 1]
        bias = {token: value for token, value in {**params.logit_bias, **single}.items() if token < self._vocab_size}
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))
        ends = {token for token in ends if token < self._vocab_size}  # a tokenizer may know more than the model
        edits = _RowEdits(
            penalised=penalised,
            bias=(upload(list(bias), self._device), upload(list(bias.values()), self._device, torch.float32))
            if bias
            else None,
            min_tokens=params.min_tokens,
            ends=upload(sorted(ends), self._device) if ends and params.min_tokens > 0 else None,
            bad_words=BadWords(phrases, output_token_ids, self._device) if phrases else None,
        )
        self._rows.pop(row, None)
        if penalised or edits.forbids:
            self._rows[row] = edits
        return row in self._rows

    def clear_row(self, row: int) -> None:
        self._rows.pop(row, None)

    def apply(
        self,
        logits: Tensor,
        rows: npt.NDArray[np.int64],
        steps: npt.NDArray[np.int64],
        bitmask: Tensor | None,
        guided: npt.NDArray[np.bool_] | None,
    ) -> None:
        """Edit logits [B, V] in place: penalties, then biases, then forbidden tokens, then the grammar's mask.

        A grammar is the stronger one: where min_tokens, bad words or biases leave none of the tokens that the
        grammar allows, they are ignored for the step.
        """
        self._apply_penalties(logits, rows)
        unforbidden: dict[int, Tensor] = {}
        for line, row in enumerate(rows.tolist()):
            edits = self._rows.get(row)
            if edits is None or not edits.forbids:
                continue
            target = logits[line]
            if guided is not None and guided[line]:
                unforbidden[line] = target.clone()
            if edits.bias is not None:
                target.index_add_(0, *edits.bias)
            if edits.ends is not None and steps[line] < edits.min_tokens:
                target.index_fill_(0, edits.ends, -math.inf)
            if edits.bad_words is not None:
                edits.bad_words.apply(target)
        if bitmask is not None and guided is not None and guided.any():
            self._apply_grammars(logits, bitmask, guided, unforbidden)

    def record(self, rows: npt.NDArray[np.int64], tokens: Tensor) -> None:
        """Add the sampled tokens [B] to the state of the rows that have some."""
        host_rows = rows.tolist()
        safe = tokens.clamp(min=0)
        penalised = [line for line, row in enumerate(host_rows) if row in self._rows and self._rows[row].penalised]
        if penalised and self._penalties is not None:
            lines = upload(penalised, self._device)
            self._penalties.record(safe[lines], upload(rows[penalised], self._device), rows[penalised])
        for line, row in enumerate(host_rows):
            edits = self._rows.get(row)
            if edits is not None and edits.bad_words is not None:
                edits.bad_words.record(safe[line])

    def _apply_penalties(self, logits: Tensor, rows: npt.NDArray[np.int64]) -> None:
        if self._penalties is None:
            return
        lines = [line for line, row in enumerate(rows.tolist()) if row in self._rows and self._rows[row].penalised]
        if lines:
            self._penalties.apply(logits, upload(lines, self._device), upload(rows[lines], self._device), rows[lines])

    def _apply_grammars(
        self, logits: Tensor, bitmask: Tensor, guided: npt.NDArray[np.bool_], unforbidden: dict[int, Tensor]
    ) -> None:
        lines = upload(np.flatnonzero(guided), self._device)
        mask = bitmask.to(self._device, non_blocking=True)
        forbidden = ~unpack_bitmask(mask[lines], self._vocab_size)
        if not unforbidden:
            if len(lines) == logits.shape[0]:
                logits.masked_fill_(forbidden, -math.inf)
            else:
                logits.index_copy_(0, lines, logits[lines].masked_fill_(forbidden, -math.inf))
            return
        masked = logits[lines].masked_fill_(forbidden, -math.inf)
        for place, line in enumerate(np.flatnonzero(guided).tolist()):
            if line in unforbidden:
                dead = masked[place].amax() == -math.inf
                alone = unforbidden[line].masked_fill_(forbidden[place], -math.inf)
                masked[place] = torch.where(dead, alone, masked[place])
        logits.index_copy_(0, lines, masked)
