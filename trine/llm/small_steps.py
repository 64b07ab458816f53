"""Steps of few tokens: from the scheduler's plan to a replayed graph."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import torch

from trine.kernels.triton.staging import FIELDS
from trine.llm.graphs import Size, StepGraphs
from trine.llm.models.base import CausalLM
from trine.llm.sampling.upload import upload
from trine.llm.scheduler import Step


class SmallSteps:
    """Keeps the rows' block tables on the device and runs small steps from there. Must hear of every step."""

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
        self._graphs = StepGraphs(model, last_token, self._table, block_size)

    def rehearse(self, first: bool) -> None:
        """See `Worker.rehearse`."""
        self._graphs.rehearse(first)

    def run(self, step: Step, greedy: bool) -> torch.Tensor | None:
        """See `StepGraphs.run`; without waiting for the device. None for a step that is run elsewhere."""
        size = self._size(step)
        if size is None:
            self._stale.update(new.row for new in step.new_blocks)
            return None
        decodes = step.num_decodes
        counts = np.array(step.counts, dtype=np.int32)
        entries = np.empty((len(step.rows), FIELDS), dtype=np.int32)
        entries[:, 0] = step.rows
        entries[:, 1] = step.starts
        entries[:, 1] += counts
        entries[:decodes, 2] = [-1 if tokens is None else tokens[0] for tokens in step.tokens[:decodes]]
        entries[decodes:, 2] = np.cumsum(counts[decodes:]) - counts[decodes:]
        entries[:, 3] = 0
        width = -(-int(entries[:, 1].max()) // self._block_size)
        if step.new_blocks or self._stale:
            self._bring_news(step, entries, width)
        known = list(chain.from_iterable(tokens or () for tokens in step.tokens[decodes:]))
        prompts = np.concatenate(
            (np.array(known, dtype=np.int32), self._host_table[step.rows[decodes:], :width].ravel())
        )
        num_used = size.decodes + len(known) if size.tokens else decodes
        header = decodes, len(entries) - decodes, len(known), width, num_used
        return self._graphs.run(size, header, entries, prompts, greedy)

    def _size(self, step: Step) -> Size | None:
        """The graph for a step after each of whose entries a token is sampled.

        A newcomer with one token left to compute may share a block that another fills in this very step.
        """
        if len(step.sampled) < len(step.rows) or step.prompt_targets:
            return None
        prompts = step.counts[step.num_decodes :]
        return self._graphs.size(step.num_decodes, len(prompts), sum(prompts), settled=not step.new_rows)

    def _bring_news(self, step: Step, entries: np.ndarray[Any, np.dtype[np.int32]], width: int) -> None:
        """A decode whose one new block is for this very token gets it with its entry, others their whole table; prompts
        bring theirs.
        """
        entry_of_row = {row: entry for entry, row in enumerate(step.rows[: step.num_decodes])}
        for row, start, block_ids in step.new_blocks:
            entry = entry_of_row.get(row)
            if entry is None or row in self._stale or len(block_ids) > 1:
                self._stale.add(row)
            elif start == step.starts[entry] // self._block_size > 0:
                entries[entry, 3] = block_ids[0]
            else:
                self._stale.add(row)
        self._stale.difference_update(step.rows[step.num_decodes :])
        stale = [row for row in self._stale if row in entry_of_row]
        if stale:
            index = upload(stale, self._table.device)
            self._table[index, :width] = upload(self._host_table[stale, :width], self._table.device)
            self._stale.difference_update(stale)
