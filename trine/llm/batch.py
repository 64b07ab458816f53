"""The tensors that describe one forward pass over packed tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Batch:
    """One forward pass: T packed tokens of S sequences, each contributing one or more consecutive tokens.

    Sequences with exactly one new token (decode) come first: sequences `[0, num_decodes)` have one token each, so that
    token i belongs to sequence i for i < num_decodes. All tensors live on the model's device.

    positions     [T] int64: position of each token in its sequence
    slots         [T] int64: where its key and value go: block * block_size + offset
    query_start   [S + 1] int32: first token of each sequence in the packed order; the last entry is T
    seq_lens      [S] int32: length of each sequence including its new tokens
    block_table   [S, max_blocks] int32: cache blocks of each sequence, in order; entries past its length are arbitrary
                  but valid block numbers
    max_seq_len   no sequence is longer
    output_rows   [R] int64, ascending: the tokens whose hidden states are wanted, if not all are. A model may return
                  those R rows alone, or all T
    settled       whether all cache blocks but those of the tokens themselves were written by earlier forward passes, so
                  that they can be read before this one writes
    prefill_tiles what a kernel of the prompts' attention works out in the first layer, kept for the others
    num_used      [1] int32, where tokens from that number on are padding, of which anything may become; complete before
                  the step's first kernel starts
    """

    positions: torch.Tensor
    slots: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    num_decodes: int
    max_query_len: int
    max_seq_len: int
    output_rows: torch.Tensor | None = None
    settled: bool = False
    prefill_tiles: torch.Tensor | None = None
    num_used: torch.Tensor | None = None

    def outputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """The wanted rows of what a model returned."""
        rows = self.output_rows
        return hidden if rows is None or len(hidden) == len(rows) else hidden[rows]


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What one attention layer keeps per token. Its tensors are [num_blocks, num_kv_heads, block_size, head_dim]."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    sliding_window: int | None = None

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize
