"""CUDA graphs of decode steps: the launches of a whole step, recorded once and replayed as one.

A graph makes the step's inputs from what the rows of running sequences hold on the device, runs the model and, where
every row is greedy, chooses the tokens; what changes from step to step comes in as one small copy. It has a fixed
number of rows; a step is padded up to the next size with sequences of one token in cache block 0, which the engine
keeps free for that. Lengths and block tables are read on the device, so one graph serves any lengths, but for a single
sequence, whose attention has a kernel for short contexts. A size is captured after the step in which it first came up,
whose kernels were launched one at a time, and the server is ready before any graph is.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from trine.kernels.triton.sampling import choose_greedy
from trine.kernels.triton.staging import FIELDS, HEADER, stage_decode
from trine.kernels.types import SHORT_CONTEXT
from trine.llm.batch import Batch
from trine.llm.models.base import CausalLM
from trine.llm.sampling.upload import PinnedRing

MAX_ROWS = 512


def graph_sizes(max_rows: int) -> list[int]:
    """Numbers of rows that graphs are captured for, ascending; the last one holds `max_rows`, or is MAX_ROWS.

    Above 64 rows products take tiles of 64 or more, and attention of a padding row nothing: few sizes cost no time, and
    a batch that shrinks row by row finds them captured.
    """
    steps = [1, 2, 4, 8, 16, 24, 32, 48, 64, *range(96, MAX_ROWS + 1, 32)]
    return [size for index, size in enumerate(steps) if index == 0 or steps[index - 1] < max_rows]


class DecodeGraphs:
    """Decode steps of a model, one new token a row. One instance a model and device.

    No row may share a cache block that is written in the same step (`Batch.settled`).

    last_token [rows + 1] int64 and table [rows, columns] int32 are the rows' state: the tokens sampled last, and cache
    blocks. The last entry of `last_token` is nobody's.
    """

    def __init__(self, model: CausalLM, last_token: torch.Tensor, table: torch.Tensor, block_size: int) -> None:
        self.model = model
        self.sizes = graph_sizes(table.shape[0])
        self._last_token = last_token
        self._table = table
        self._block_size = block_size
        self._graphs: dict[
            tuple[int, bool, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor]
        ] = {}  # size, greedy, short
        self._pool = torch.cuda.graph_pool_handle()
        device, rows = table.device, self.sizes[-1]
        self._step = torch.zeros(HEADER + FIELDS * rows, dtype=torch.int32, device=device)
        self._on_host = PinnedRing(self._step.shape[0])
        self._token_ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self._rows = torch.zeros(rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self._slots = torch.zeros(rows, dtype=torch.int64, device=device)
        self._query_start = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._seq_lens = torch.ones(rows, dtype=torch.int32, device=device)
        self._block_table = torch.zeros((rows, table.shape[1]), dtype=torch.int32, device=device)

    def can_run(self, num_rows: int) -> bool:
        return 0 < num_rows <= self.sizes[-1]

    def run(self, entries: npt.NDArray[np.int32], width: int, greedy: bool) -> torch.Tensor:
        """The tokens [n] int64 that n rows choose, or if not `greedy` their hidden states [n, H].

        entries [n, FIELDS]: see `stage_decode`; width: columns of the longest one's block table. A token is -1 where
        logits are not finite. What is returned holds until the next run.
        """
        num_rows = len(entries)
        host = self._on_host.next()
        host[0], host[1] = num_rows, width
        host[HEADER : HEADER + entries.size] = entries.reshape(-1)
        self._on_host.copy_to(self._step, HEADER + entries.size)
        size = next(size for size in self.sizes if size >= num_rows)
        key = (size, greedy, size == 1 and width * self._block_size <= SHORT_CONTEXT)
        if key in self._graphs:
            graph, result = self._graphs[key]
            graph.replay()
            return result[:num_rows]
        result = self._compute(*key)
        self._graphs[key] = self._capture(*key)
        return result[:num_rows]

    def rehearse(self) -> None:
        """Compute a step of every size, for `trine.kernels.triton.launch.recording`."""
        for size in self.sizes:
            self._compute(size, greedy=True, short=size == 1)
        self._compute(1, greedy=True, short=False)

    def _compute(self, size: int, greedy: bool, short: bool) -> torch.Tensor:
        token_ids, rows = self._token_ids[:size], self._rows[:size]
        batch = Batch(
            positions=self._positions[:size],
            slots=self._slots[:size],
            query_start=self._query_start[: size + 1],
            seq_lens=self._seq_lens[:size],
            block_table=self._block_table[:size],
            num_decodes=size,
            max_query_len=1,
            max_seq_len=SHORT_CONTEXT if short else self._table.shape[1] * self._block_size,
            settled=True,
        )
        stage_decode(self._step, self._last_token, self._table, self._block_size, token_ids, rows, batch)
        hidden = self.model(token_ids, batch)
        return choose_greedy(self.model.compute_logits(hidden), rows, self._last_token) if greedy else hidden

    def _capture(self, size: int, greedy: bool, short: bool) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Record a step; nothing runs. It has run before, so that what it makes at first use is made."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = self._compute(size, greedy, short)
        return graph, result
