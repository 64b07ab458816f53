"""CUDA graphs of small steps: the launches of a whole step, recorded once and replayed as one.

A graph makes the step's inputs from what the rows of running sequences hold on the device, runs the model and, where
every row is greedy, chooses the tokens; what changes from step to step comes in as one small copy. It has a fixed
number of rows that decode and, where prompts may be among them, of tokens and sequences. A step is padded up to the
next size: with decodes of one token and a prompt of what tokens are left, both in cache block 0, which the engine
keeps free for that, and with sequences of no tokens. Lengths and block tables are read on the device, so one graph
serves any lengths, but for a single sequence that decodes, whose attention has a kernel for short contexts. A size is
captured after the step in which it first came up, whose kernels were launched one at a time, and the server is ready
before any graph is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from trine.kernels.triton.sampling import choose_greedy
from trine.kernels.triton.staging import FIELDS, HEADER, stage
from trine.kernels.types import SHORT_CONTEXT
from trine.llm.batch import Batch
from trine.llm.models.base import CausalLM
from trine.llm.sampling.upload import PinnedRing

MAX_ROWS = 512
DECODES = (1, 2, 4, 8, 16, 24, 32, 48, *range(64, MAX_ROWS + 1, 32))
"""Rows of a step of decodes. Above 64 rows products take tiles of 64 or more, and attention of a padding row nothing:
few sizes cost no time, and a batch that shrinks row by row finds them captured."""
BESIDE_PROMPTS = (0, 8, 32, 64, 128, 256, 512)
"""Rows that decode in a step with prompts."""
TOKENS = (32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
"""Of a step with prompts."""
LAUNCHES = 2.3e11
"""Of a layer single launches take the host as long as an H200 takes for so many multiplications of 16 bits: steps with
more lose nothing by them, and would by padding."""


class Size(NamedTuple):
    """A graph's: `decodes` rows, then prompts of all other tokens, if there are `tokens` at all."""

    decodes: int
    tokens: int = 0

    @property
    def sequences(self) -> int:
        """Beside the decodes place for eight, or for prompts of 32 tokens; the last one is what pads."""
        return self.decodes + (max(self.tokens // 32, 8) if self.tokens else 0)


def graph_sizes(sizes: Sequence[int], most: int) -> list[int]:
    """Those of the ascending `sizes` that steps of up to `most` can use."""
    return [size for index, size in enumerate(sizes) if index == 0 or sizes[index - 1] < most]


def token_sizes(layer_work: int) -> list[int]:
    """Sizes of steps with prompts that gain, of a model with so many multiplications a layer and token; up to 128
    tokens in any case.
    """
    return [tokens for tokens in TOKENS if tokens <= max(LAUNCHES / layer_work, 128)]


class StepGraphs:
    """Small steps of a model. One instance a model and device.

    last_token [rows + 1] int64 and table [rows, columns] int32 are the rows' state: the tokens sampled last, and cache
    blocks. The last entry of `last_token` is nobody's.
    """

    def __init__(self, model: CausalLM, last_token: torch.Tensor, table: torch.Tensor, block_size: int) -> None:
        self.model = model
        max_rows, columns = table.shape
        self.decodes = [Size(rows) for rows in graph_sizes(DECODES, max_rows)]
        beside = graph_sizes(BESIDE_PROMPTS, max_rows)
        totals = token_sizes(model.layer_work)
        self.with_prompts = [Size(rows, tokens) for tokens in totals for rows in beside if rows < tokens]
        self._last_token = last_token
        self._table = table
        self._block_size = block_size
        self._graphs: dict[tuple[Size, bool, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        device, tokens = table.device, max(totals[-1], self.decodes[-1].decodes)
        sequences = max(size.sequences for size in self.decodes + self.with_prompts)
        self._token_ids = torch.zeros(tokens, dtype=torch.int64, device=device)
        self._positions = torch.zeros(tokens, dtype=torch.int64, device=device)
        self._slots = torch.zeros(tokens, dtype=torch.int64, device=device)
        self._query_start = torch.zeros(sequences + 1, dtype=torch.int32, device=device)
        self._seq_lens = torch.ones(sequences, dtype=torch.int32, device=device)
        columns = max(columns, -(-tokens // block_size))  # a prompt of padding has as many
        prompts = max(size.sequences - size.decodes for size in self.with_prompts)
        numbers = HEADER + FIELDS * sequences + tokens + prompts * columns
        self._step = torch.zeros(numbers, dtype=torch.int32, device=device)
        self._block_table = torch.zeros((sequences, columns), dtype=torch.int32, device=device)
        self._rows = torch.zeros(sequences, dtype=torch.int64, device=device)
        self._output_rows = torch.zeros(sequences, dtype=torch.int64, device=device)
        self._on_host = PinnedRing(self._step.shape[0])

    def size(self, num_decodes: int, num_prompts: int, num_prompt_tokens: int, settled: bool) -> Size | None:
        """The least that holds so many; None where no graph does.

        settled: no row shares a cache block that is written in the same step (`Batch.settled`).
        """
        if num_prompts == 0 and settled:
            return next((size for size in self.decodes if size.decodes >= num_decodes > 0), None)
        for size in self.with_prompts:
            fits = size.decodes >= num_decodes and size.tokens - size.decodes >= num_prompt_tokens
            if fits and size.sequences - size.decodes > num_prompts:
                return size
        return None

    def run(
        self,
        size: Size,
        header: Sequence[int],
        entries: npt.NDArray[np.int32],
        prompts: npt.NDArray[np.int32],
        greedy: bool,
    ) -> torch.Tensor:
        """The tokens [n] int64 that n rows choose, or if not `greedy` their hidden states [n, H].

        header, entries [n, FIELDS], the prompts' tokens and block tables: see `stage`. A token is -1 where logits are
        not finite. What is returned holds until the next run.
        """
        self._send(header, entries, prompts)
        key = size, greedy, size == Size(1) and header[3] * self._block_size <= SHORT_CONTEXT
        if key in self._graphs:
            graph, result = self._graphs[key]
            graph.replay()
        else:
            result = self._compute(*key)
            self._graphs[key] = self._capture(*key)
        return result[: len(entries)]

    def rehearse(self, first: bool) -> None:
        """Compute those of a short prompt and its decodes, or steps of every other kind: see `Worker.rehearse`."""
        prompts = [size for size in self.with_prompts if not size.decodes]
        short = next(size for size in prompts if size.tokens >= 128)
        if first:
            self._compute(short, greedy=True, short=False)
            self._compute(Size(1), greedy=True, short=True)
        else:
            for size in self.decodes + prompts:
                self._compute(size, greedy=True, short=False)

    def _send(self, header: Sequence[int], entries: npt.NDArray[np.int32], prompts: npt.NDArray[np.int32]) -> None:
        host, at = self._on_host.next(), HEADER + entries.size
        host[:HEADER] = header
        host[HEADER:at] = entries.reshape(-1)
        host[at : at + prompts.size] = prompts
        self._on_host.copy_to(self._step, at + prompts.size)

    def _compute(self, size: Size, greedy: bool, short: bool) -> torch.Tensor:
        num_tokens, sequences = size.tokens or size.decodes, size.sequences
        token_ids, rows, output_rows = (
            self._token_ids[:num_tokens],
            self._rows[:sequences],
            self._output_rows[:sequences],
        )
        batch = Batch(
            positions=self._positions[:num_tokens],
            slots=self._slots[:num_tokens],
            query_start=self._query_start[: sequences + 1],
            seq_lens=self._seq_lens[:sequences],
            block_table=self._block_table[:sequences],
            num_decodes=size.decodes,
            max_query_len=max(num_tokens - size.decodes, 1),
            max_seq_len=SHORT_CONTEXT if short else self._block_table.shape[1] * self._block_size,
            output_rows=output_rows if size.tokens else None,
            settled=not size.tokens,
            num_used=self._step[HEADER - 1 : HEADER],
        )
        stage(self._step, self._last_token, self._table, self._block_size, token_ids, batch, rows, output_rows)
        hidden = batch.outputs(self.model(token_ids, batch))
        return choose_greedy(self.model.compute_logits(hidden), rows, self._last_token) if greedy else hidden

    def _capture(self, size: Size, greedy: bool, short: bool) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Record a step; nothing runs. It has run before, so that what it makes at first use is made."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other, _ in self._graphs.values()), None)  # for all, of which one runs at a time
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = self._compute(size, greedy, short)
        return graph, result
