"""CUDA graphs of decode steps: the launches of a whole forward pass, recorded once and replayed as one.

A graph has a fixed number of rows; a step is padded up to the next size. Padding rows are sequences of one token in
cache block 0, which the engine keeps free for that. Lengths and block tables are read on the device, so one graph
serves any lengths. A size is captured when it has come up often enough to be worth it; until then the model runs
directly, and the server is ready before any graph is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

from trine.llm.batch import Batch

MAX_ROWS = 512
CAPTURE_AT = 2  # the use of a size at which it is captured

Forward = Callable[[torch.Tensor, Batch], torch.Tensor]


def graph_sizes(max_rows: int) -> list[int]:
    """Numbers of rows that graphs are captured for, ascending; the last one holds `max_rows`, or is MAX_ROWS."""
    steps = [1, 2, 4, 8, *range(16, 257, 8), *range(288, MAX_ROWS + 1, 32)]
    return [size for index, size in enumerate(steps) if index == 0 or steps[index - 1] < max_rows]


class DecodeGraphs:
    """Replays `model(token_ids, batch)` for batches of decode rows only. One instance a model and device."""

    def __init__(self, model: Forward, *, max_num_seqs: int, max_blocks: int, device: torch.device) -> None:
        self.model = model
        self.sizes = graph_sizes(max_num_seqs)
        self._uses: Counter[int] = Counter()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        rows = self.sizes[-1]
        self._token_ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self._batch = Batch(
            positions=torch.zeros(rows, dtype=torch.int64, device=device),
            slots=torch.zeros(rows, dtype=torch.int64, device=device),
            query_start=torch.arange(rows + 1, dtype=torch.int32, device=device),
            seq_lens=torch.ones(rows, dtype=torch.int32, device=device),
            block_table=torch.zeros((rows, max_blocks), dtype=torch.int32, device=device),
            num_decodes=rows,
            max_query_len=1,
            max_seq_len=1,
        )

    def can_run(self, num_rows: int) -> bool:
        """Whether a step of `num_rows` decode rows should replay a graph; counts the use."""
        if not 0 < num_rows <= self.sizes[-1]:
            return False
        size = self._padded(num_rows)
        self._uses[size] += 1
        return size in self._graphs or self._uses[size] >= CAPTURE_AT

    def run(self, token_ids: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Hidden states [n, H] of n decode rows; they hold until the next run."""
        from trine.kernels.triton.staging import stage_decode

        num_rows = token_ids.shape[0]
        size = self._padded(num_rows)
        to_token_ids, to_batch = self._inputs(size)
        stage_decode(token_ids, batch, to_token_ids, to_batch)
        if size not in self._graphs:
            self._graphs[size] = self._capture(to_token_ids, to_batch)
        graph, hidden = self._graphs[size]
        graph.replay()
        return hidden[:num_rows]

    def _padded(self, num_rows: int) -> int:
        return next(size for size in self.sizes if size >= num_rows)

    def _inputs(self, size: int) -> tuple[torch.Tensor, Batch]:
        """The first `size` rows of the buffers that graphs read."""
        batch = self._batch
        return self._token_ids[:size], Batch(
            positions=batch.positions[:size],
            slots=batch.slots[:size],
            query_start=batch.query_start[: size + 1],
            seq_lens=batch.seq_lens[:size],
            block_table=batch.block_table[:size],
            num_decodes=size,
            max_query_len=1,
            max_seq_len=1,
        )

    def _capture(self, token_ids: torch.Tensor, batch: Batch) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Record the model on these buffers. It runs once before, so that what it makes at first use is made.

        Running it twice on the same inputs is harmless: a step writes the same keys and values to the same slots.
        """
        self.model(token_ids, batch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = self.model(token_ids, batch)
        return graph, hidden
