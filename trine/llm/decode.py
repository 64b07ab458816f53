"""Steps in which every sequence decodes: from the scheduler's plan to a replayed graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from trine.kernels.triton.staging import FIELDS
from trine.llm.graphs import DecodeGraphs
from trine.llm.models.base import CausalLM
from trine.llm.sampling.upload import upload
from trine.llm.scheduler import Step


class DecodeSteps:
    """Keeps the rows' block tables on the device and runs decode steps from there. Must hear of every step."""

    def __init__(
        self,
        model: CausalLM,
        last_token: torch.Tensor,
        host_table: np.ndarray[Any, np.dtype[np.int32]],
        block_size: int,
    ) -> None:
        self._stale: set[int] = set()  # rows whose table on the host is ahead of the device's
        self._host_table = host_table
        self._block_size = block_size
        self._table = torch.zeros(host_table.shape, dtype=torch.int32, device=last_token.device)
        self._graphs = DecodeGraphs(model, last_token, self._table, block_size)

    def can_run(self, step: Step) -> bool:
        """Whether each sequence computes one token and samples after it, and a graph holds as many.

        A newcomer with one token left to compute may share a block that another fills in this very step.
        """
        count = len(step.rows)
        return (
            step.num_decodes == count == len(step.sampled)
            and not step.prompt_targets
            and not step.new_rows
            and self._graphs.can_run(count)
        )

    def rehearse(self) -> None:
        self._graphs.rehearse()

    def missed(self, step: Step) -> None:
        """A step that was run elsewhere."""
        self._stale.update(new.row for new in step.new_blocks)

    def run(self, step: Step, greedy: bool) -> torch.Tensor:
        """See `DecodeGraphs.run`; without waiting for the device."""
        entries = np.empty((len(step.rows), FIELDS), dtype=np.int32)
        entries[:, 0] = step.rows
        entries[:, 1] = step.starts
        entries[:, 1] += 1
        entries[:, 2] = [-1 if tokens is None else tokens[0] for tokens in step.tokens]
        entries[:, 3] = 0
        width = -(-int(entries[:, 1].max()) // self._block_size)
        if step.new_blocks or self._stale:
            self._bring_news(step, entries, width)
        return self._graphs.run(entries, width, greedy)

    def _bring_news(self, step: Step, entries: np.ndarray[Any, np.dtype[np.int32]], width: int) -> None:
        """A row whose one new block is for this very token gets it with its entry, others their whole table."""
        entry_of_row = {row: entry for entry, row in enumerate(step.rows)}
        for row, start, block_ids in step.new_blocks:
            entry = entry_of_row.get(row)
            if entry is None or row in self._stale or len(block_ids) > 1:
                self._stale.add(row)
            elif start == step.starts[entry] // self._block_size > 0:
                entries[entry, 3] = block_ids[0]
            else:
                self._stale.add(row)
        stale = [row for row in self._stale if row in entry_of_row]
        if stale:
            index = upload(stale, self._table.device)
            self._table[index, :width] = upload(self._host_table[stale, :width], self._table.device)
            self._stale.difference_update(stale)
