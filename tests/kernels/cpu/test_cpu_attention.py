"""Native query-key-value preparation and paged attention against the reference."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cpu.cpu_common import TOLERANCE, error
from trine.kernels import cpu, reference
from trine.llm.batch import Batch


class Case:
    """A paged cache holding `lengths` tokens a sequence, of which the last `new` are the batch's queries."""

    def __init__(
        self,
        lengths: list[int],
        new: list[int],
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        order = sorted(range(len(lengths)), key=lambda i: new[i] > 1)
        self.lengths, self.new = [lengths[i] for i in order], [new[i] for i in order]
        blocks = [-(-length // block_size) for length in self.lengths]
        width = max(blocks) + 2
        total = sum(blocks) + 3
        shuffled = torch.randperm(total, generator=generator)
        # Entries past a sequence's blocks are any valid blocks; here block `total`, which is full of NaN.
        table = torch.full((len(lengths), width), total, dtype=torch.int32)
        shape = (total + 1, kv_heads, block_size, head_dim)
        self.k_cache, self.v_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        self.keys, self.values = [], []
        first = 0
        for row, (length, count) in enumerate(zip(self.lengths, blocks, strict=True)):
            own = shuffled[first : first + count]
            first += count
            table[row, :count] = own.int()
            slots = (own[:, None] * block_size + torch.arange(block_size)).flatten()[:length]
            keys = torch.randn(length, kv_heads, head_dim, generator=generator)
            values = torch.randn(length, kv_heads, head_dim, generator=generator)
            reference.write_cache(self.k_cache, keys, slots)
            reference.write_cache(self.v_cache, values, slots)
        self.k_cache, self.v_cache = self.k_cache.to(dtype), self.v_cache.to(dtype)
        starts = torch.tensor([0, *self.new]).cumsum(0).int()
        self.q = torch.randn(int(starts[-1]), heads, head_dim, generator=generator).to(dtype)
        positions = [torch.arange(n - m, n) for n, m in zip(self.lengths, self.new, strict=True)]
        self.batch = Batch(
            positions=torch.cat(positions),
            slots=torch.zeros(int(starts[-1]), dtype=torch.int64),
            query_start=starts,
            seq_lens=torch.tensor(self.lengths, dtype=torch.int32),
            block_table=table,
            num_decodes=sum(count == 1 for count in self.new),
            max_query_len=max(self.new),
            max_seq_len=max(self.lengths),
        )

    def single(self, sequence: int, start: int, end: int) -> tuple[torch.Tensor, Batch]:
        """Queries [start, end) of one sequence's new tokens, as a batch of its own whose context ends with them."""
        first = int(self.batch.query_start[sequence])
        length = self.lengths[sequence] - self.new[sequence] + end
        batch = Batch(
            positions=torch.arange(length - (end - start), length),
            slots=torch.zeros(end - start, dtype=torch.int64),
            query_start=torch.tensor([0, end - start], dtype=torch.int32),
            seq_lens=torch.tensor([length], dtype=torch.int32),
            block_table=self.batch.block_table[sequence : sequence + 1],
            num_decodes=int(end - start == 1),
            max_query_len=end - start,
            max_seq_len=length,
        )
        return self.q[first + start : first + end], batch


def attend(module: object, case: Case, window: int | None) -> torch.Tensor:
    scale = case.q.shape[2] ** -0.5
    result = module.paged_attention(case.q, case.k_cache, case.v_cache, case.batch, scale, window)  # type: ignore[attr-defined]
    assert isinstance(result, torch.Tensor)
    return result


MIXED = ([1, 5, 17, 64, 65, 130, 200, 600, 33, 128, 90], [1, 1, 1, 1, 1, 1, 1, 1, 33, 128, 40])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(14, 2, 64), (4, 4, 32), (8, 1, 128), (3, 3, 20), (2, 1, 8)]
)
def test_mixed_decodes_and_prefills(native: str, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    case = Case(*MIXED, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    for window in (None, 1, 7, 100):
        assert error(attend(cpu, case, window), attend(reference, case, window)) < TOLERANCE[dtype]


@pytest.mark.parametrize("block_size", [1, 8, 16, 24, 64, 256])
def test_block_sizes(native: str, block_size: int) -> None:
    case = Case([1, 70, 300, 45], [1, 1, 1, 45], heads=6, kv_heads=2, head_dim=16, block_size=block_size)
    assert error(attend(cpu, case, None), attend(reference, case, None)) < 2e-5


def test_long_contexts_are_split(native: str) -> None:
    case = Case([3000, 513, 2049], [1, 1, 1], heads=7, kv_heads=1, head_dim=64)
    for window in (None, 600, 1500):
        assert error(attend(cpu, case, window), attend(reference, case, window)) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_batch_or_chunk(native: str, dtype: torch.dtype) -> None:
    case = Case([1100, 700, 40, 1, 90], [200, 1, 40, 1, 90], heads=6, kv_heads=2, head_dim=64, dtype=dtype)
    for window in (None, 50, 700):
        whole = attend(cpu, case, window)
        for sequence, new in enumerate(case.new):
            first = int(case.batch.query_start[sequence])
            for start, end in {(0, new), (0, 1), (new - 1, new), (new // 3, new // 2 + 1), (new // 2, new)}:
                q, batch = case.single(sequence, start, end)
                part = cpu.paged_attention(q, case.k_cache, case.v_cache, batch, 64**-0.5, window)
                assert torch.equal(part, whole[first + start : first + end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rotary", [None, 16, 64])
@pytest.mark.parametrize("norms", [False, True])
def test_prepare_qkv(native: str, dtype: torch.dtype, rotary: int | None, norms: bool) -> None:
    torch.manual_seed(5)
    for tokens in (1, 3, 200):
        heads, kv_heads, size = 6, 2, 64
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * size).to(dtype)
        positions = torch.randint(0, 500, (tokens,))
        slots = torch.randperm(16 * 20)[:tokens]
        table = torch.randn(500, rotary) if rotary else None
        q_norm, k_norm = (torch.rand(2, size).to(dtype) + 0.5).unbind() if norms else (None, None)
        results = []
        for module in (cpu, reference):
            caches = torch.zeros(2, 20, kv_heads, 16, size, dtype=dtype)
            q = module.prepare_qkv(
                qkv.clone(), heads, kv_heads, size, positions, table, q_norm, k_norm, 1e-6, caches[0], caches[1], slots
            )
            assert q.shape == (tokens, heads, size)
            results.append((q, caches[0], caches[1]))
        for actual, expected in zip(*results, strict=True):
            assert error(actual, expected) < TOLERANCE[dtype]
        assert torch.equal(results[0][2], results[1][2])
