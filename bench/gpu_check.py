"""Everything about the GPU path in one call: right against the reference, fast against the card, the engine on top.

    python bench/gpu_check.py [--only kernels,timing,tuning,engine,long,speed,profile] [--json FILE]

kernels  every kernel against trine.kernels.reference on random shapes
timing   each kernel's time, as a share of what a copy (or a matrix product) reaches on this card in the same run
tuning   the free choices of the attention kernels, timed
engine   small random checkpoints: greedy tokens equal to Transformers' in float32, graphs on and off
long     a trained model: answers of 1,024 tokens in bfloat16 beside Transformers'
speed    tokens a second with random weights of real shapes (speed depends on shapes only)
profile  where the time of a decode step goes
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gpu_engine
import torch
from gpu_report import Report

from trine.kernels import fp8, ops, reference
from trine.kernels import triton as kernels
from trine.kernels.fp8 import Fp8Weight, RowToNorm
from trine.kernels.triton import fp8 as gpu_fp8
from trine.kernels.triton import sampling
from trine.kernels.triton.decode_attention import DecodeTuning, decode_attention
from trine.kernels.triton.prefill_attention import PrefillTuning, prefill_attention
from trine.kernels.triton.small_linear import (
    MAX_ROWS,
    small_gated_linear,
    small_linear,
    small_qkv_linear,
)
from trine.llm.batch import Batch
from trine.llm.sampling import distribution

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of ‖out − ref‖ / ‖ref‖
Check = tuple[str, float, float]  # name, error, largest error allowed


# ---------------------------------------------------------------- batches


def random_batch(seq_lens: list[int], query_lens: list[int], block_size: int, num_blocks: int, seed: int = 0) -> Batch:
    """Sequences over random blocks from 1 on, each block used once; single tokens must come first."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // block_size) for length in seq_lens]
    order = 1 + torch.randperm(num_blocks - 1, generator=generator)[: sum(counts)]
    table = torch.zeros((len(seq_lens), max(counts)), dtype=torch.int64)
    for row, blocks in enumerate(order.split(counts)):
        table[row, : len(blocks)] = blocks
    entries = torch.repeat_interleave(torch.arange(len(seq_lens)), torch.tensor(query_lens))
    positions = torch.cat([torch.arange(s - n, s) for s, n in zip(seq_lens, query_lens, strict=True)])
    slots = table[entries, positions // block_size] * block_size + positions % block_size
    return Batch(
        positions=positions.to(DEVICE),
        slots=slots.to(DEVICE),
        query_start=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32).to(DEVICE),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE),
        block_table=table.to(torch.int32).to(DEVICE),
        num_decodes=sum(n == 1 for n in query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def caches(num_blocks: int, heads: int, block_size: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [randn(num_blocks, heads, block_size, size, dtype=dtype) for _ in range(2)]


# ---------------------------------------------------------------- kernels against the reference


def compare(name: str, actual: torch.Tensor, expected: torch.Tensor) -> Check:
    error = float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
    return f"{name} {str(expected.dtype).removeprefix('torch.')}", error, TOLERANCE.get(expected.dtype, 0.0)


def check_round(seed: int) -> list[Check]:
    """Every kernel once, on shapes and values that follow from `seed`."""
    chooser = random.Random(seed)
    torch.manual_seed(seed)
    halves = [torch.bfloat16, torch.bfloat16, torch.float16] if DEVICE.type == "cuda" else [torch.float16]
    dtype = chooser.choice([*halves, torch.float32])
    return [*check_elementwise(chooser, dtype), *check_attention(chooser, dtype, decode_only=seed % 2 == 0)]


def check_kernels(report: Report, rounds: int, seed: int) -> None:
    """Rounds side by side in processes: most of their time is the compiler's."""
    processes = min(rounds, max(1, (os.cpu_count() or 2) - 4))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        checks = [check for found in pool.imap_unordered(check_round, range(seed, seed + rounds)) for check in found]
    for name in sorted({name for name, _, _ in checks}):
        errors = [error for own, error, _ in checks if own == name]
        worst = next((e for e in errors if not math.isfinite(e)), max(errors))
        report.show("kernels", name, checks=len(errors), worst=worst)
    for name, error, allowed in checks:
        if not error <= allowed:
            report.fail(f"{name}: error {error:.2e}")


def check_elementwise(chooser: random.Random, dtype: torch.dtype) -> Iterator[Check]:
    rows, size = chooser.choice([1, 3, 70]), chooser.choice([64, 896, 1000, 4096])
    x, residual = randn(rows, size, dtype=dtype), randn(rows, size, dtype=dtype)
    weight, bias = randn(size, dtype=dtype), randn(size, dtype=dtype)
    yield compare("rms_norm", kernels.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    expected = reference.layer_norm(x, weight, bias, 1e-5)
    yield compare("layer_norm", kernels.layer_norm(x, weight, bias, 1e-5), expected)
    other = residual.clone()
    expected = reference.add_rms_norm(x, other, weight, 1e-6)
    yield compare("add_rms_norm", kernels.add_rms_norm(x, residual, weight, 1e-6), expected)
    yield compare("add_rms_norm residual", residual, other)
    yield compare("silu_mul", kernels.silu_mul(x), reference.silu_mul(x))
    yield compare("gelu tanh", kernels.gelu(x, "tanh"), reference.gelu(x, "tanh"))
    logits = randn(rows, size * 7, dtype=torch.float32)
    yield compare("argmax", sampling.argmax(logits)[1], logits.argmax(1))
    yield from check_thresholds(chooser, rows)
    few, table = x[:MAX_ROWS], randn(100, size, dtype=dtype)
    yield compare("small_linear", small_linear(few, table), reference.linear(few.double(), table.double()).to(dtype))
    gates, first = randn(2 * chooser.choice([5, 32, 100]), size, dtype=dtype), x[:1]
    expected = reference.silu_mul(reference.linear(first.double(), gates.double()))
    yield compare("small_gated_linear", small_gated_linear(first, gates), expected.to(dtype))
    if DEVICE.type == "cuda" and dtype != torch.float32:
        yield from check_stream(chooser, dtype)
        yield from check_register_linear(chooser, dtype)
    yield compare("gelu none", kernels.gelu(x, "none"), reference.gelu(x, "none"))


def check_thresholds(chooser: random.Random, rows: int) -> Iterator[Check]:
    """Tokens that filters keep, without sorting against with; one token on an edge may fall on either side."""
    logits = randn(rows, chooser.choice([500, 20000]), dtype=torch.float32) * chooser.choice([0.5, 5.0])
    z = distribution.scaled_logits(logits, logits.amax(1), None)
    top_k = torch.randint(0, 100, (rows,), device=DEVICE)
    top_p = torch.rand(rows, device=DEVICE, dtype=torch.float64).clamp(min=0.01)
    with ops.reference_only():
        expected = distribution.thresholds(z, top_k, top_p, None)
    kept = [
        ((z >= limit) & (distribution.weights(z) > 0)).sum(1)
        for limit in (sampling.thresholds(z, top_k, top_p, None), expected)
    ]
    yield "thresholds", float((kept[0] - kept[1]).abs().max()), 1.0


def check_stream(chooser: random.Random, dtype: torch.dtype) -> Iterator[Check]:
    """The product of 2 to 32 rows; a launch leaves its counters ready for the next."""
    from trine.kernels.triton.stream_linear import MAX_PLAIN_ROWS as MOST
    from trine.kernels.triton.stream_linear import stream_gated_linear, stream_linear

    rows, inputs = chooser.randint(1, MOST), 8 * chooser.choice([8, 112, 511, 512, 1792])
    outputs = chooser.choice([1, 33, 64, 1000, 4096, 28672])
    x, weight = randn(rows, inputs, dtype=dtype), randn(outputs, inputs, dtype=dtype)
    bias = randn(outputs, dtype=dtype) if chooser.random() < 0.5 else None
    expected = reference.linear(x.double(), weight.double(), None if bias is None else bias.double())
    for _ in range(2):
        yield compare("stream_linear", stream_linear(x, weight, bias), expected.to(dtype))
        name, error, _ = compare("stream_linear", stream_linear(x, weight, bias, torch.float32), expected.float())
        yield name, error, 1e-4  # sums of up to 14,336 numbers
    gates = randn(64 * chooser.choice([1, 7, 300]), inputs, dtype=dtype) * 0.1
    expected = reference.silu_mul(reference.linear(x.double(), gates.double()))
    for _ in range(2):
        yield compare("stream_gated_linear", stream_gated_linear(x, gates), expected.to(dtype))


def check_register_linear(chooser: random.Random, dtype: torch.dtype) -> Iterator[Check]:
    """The product of one row, with float8 weights, which may norm the row and add to what is there."""
    from trine.kernels.triton.register_linear import register_gated_linear, register_linear, register_linear_add

    inputs, outputs = 16 * chooser.choice([1, 57, 224, 256, 896]), 2 * chooser.choice([1, 33, 500, 2048, 14336])
    hidden, norm, residual = randn(1, inputs, dtype=dtype), randn(inputs, dtype=dtype), randn(1, outputs, dtype=dtype)
    hidden[:, 3] *= 1000 if dtype == torch.bfloat16 else 10  # of which gate times up fits into float16
    weight = fp8.pack_fp8(randn(outputs, inputs, dtype=torch.float32) / inputs**0.5)
    assert isinstance(weight, Fp8Weight)
    bias = randn(outputs, dtype=dtype) if chooser.random() < 0.5 else None
    wide = weight.dequantize().double()
    for x, plain in (
        (hidden, hidden.double()),
        (RowToNorm(hidden, norm, 1e-6), reference.rms_norm(hidden.double(), norm.double(), 1e-6)),
    ):
        expected = reference.linear(plain, wide, None if bias is None else bias.double())
        name, error, _ = compare("register_linear", register_linear(x, weight, bias, torch.float32), expected.float())
        terms = (plain**2 @ (wide**2).T).sqrt().norm() / expected.norm()  # few outputs may be small by cancellation
        yield name, error, 1e-3 * max(1.0, float(terms))
        total = residual.clone()
        register_linear_add(x, weight, bias, total)
        yield compare("register_linear_add", total, (residual.double() + expected).to(dtype))
        expected = reference.silu_mul(reference.linear(plain, wide))
        yield compare("register_gated_linear", register_gated_linear(x, weight), expected.to(dtype))


def check_attention(chooser: random.Random, dtype: torch.dtype, decode_only: bool) -> Iterator[Check]:
    size = chooser.choice([32, 64, 80, 96, 128, 128, 256])
    num_kv_heads, group = chooser.choice([1, 2, 8]), chooser.choice([1, 3, 4, 7, 8])
    block_size = chooser.choice([8, 16, 32, 64])
    window = chooser.choice([None, None, 1, 100])
    decodes = [chooser.choice([1, 17, 100, 900, 5000]) for _ in range(chooser.choice([1, 5, 40]))]
    chunks = [] if decode_only else [(chooser.randint(2, 300), chooser.choice([0, 33, 700])) for _ in range(3)]
    seq_lens = decodes + [new + before for new, before in chunks]
    query_lens = [1] * len(decodes) + [new for new, _ in chunks]
    num_blocks = sum(-(-length // block_size) for length in seq_lens) + 5
    batch = random_batch(seq_lens, query_lens, block_size, num_blocks, chooser.randint(0, 1 << 30))
    num_heads, num_tokens = num_kv_heads * group, sum(query_lens)
    qkv = randn(num_tokens, (num_heads + 2 * num_kv_heads) * size, dtype=dtype)
    cos_sin = torch.randn(max(seq_lens), chooser.choice([size, 32]), device=DEVICE) if chooser.random() < 0.8 else None
    norms = [randn(size, dtype=dtype) if chooser.random() < 0.5 else None for _ in range(2)]
    first = caches(num_blocks, num_kv_heads, block_size, size, dtype)
    second = [cache.clone() for cache in first]
    fixed = (num_heads, num_kv_heads, size, batch.positions, cos_sin, norms[0], norms[1], 1e-6)
    expected = reference.prepare_qkv(qkv.clone(), *fixed, first[0], first[1], batch.slots)
    actual = kernels.prepare_qkv(qkv, *fixed, second[0], second[1], batch.slots)
    yield compare("prepare_qkv", actual, expected)
    for ours, theirs in zip(second, first, strict=True):
        yield compare("prepare_qkv cache", ours, theirs)
    if cos_sin is not None and cos_sin.shape[1] == size:
        yield from check_small_qkv(dtype, fixed, second, batch)
    batch.settled = decode_only and chooser.random() < 0.5
    scale, q = size**-0.5, actual
    expected = reference.paged_attention(q, second[0], second[1], batch, scale, window)
    for _ in range(2):  # a launch leaves its counters ready for the next
        actual = kernels.paged_attention(q, second[0], second[1], batch, scale, window)
        yield compare(f"paged_attention {'decode' if decode_only else 'mixed'}", actual, expected)
    if decode_only:
        decode_attention(q, second[0], second[1], batch, scale, window, actual.zero_(), DecodeTuning())
        yield compare("decode_attention", actual, expected)


def check_small_qkv(
    dtype: torch.dtype, fixed: tuple[Any, ...], stored: list[torch.Tensor], batch: Batch
) -> Iterator[Check]:
    """The projection of one token with its rotation."""
    num_heads, num_kv_heads, size, _, cos_sin, *_ = fixed
    outputs = (num_heads + 2 * num_kv_heads) * size
    weight, bias = randn(outputs, 320, dtype=dtype) * 320**-0.5, randn(outputs, dtype=dtype)
    ways = [("small_qkv_linear", small_qkv_linear, 1)]
    if DEVICE.type == "cuda" and dtype != torch.float32 and size % 64 == 0:
        from trine.kernels.triton.stream_linear import stream_qkv_linear

        ways.append(("stream_qkv_linear", stream_qkv_linear, min(32, len(batch.slots))))
    for name, way, rows in ways:
        x, positions, slots = randn(rows, 320, dtype=dtype), batch.positions[-rows:], batch.slots[-rows:]
        heads = (num_heads, num_kv_heads, size, positions, cos_sin)
        first, second = [cache.clone() for cache in stored], [cache.clone() for cache in stored]
        qkv = reference.linear(x, weight, bias)
        expected = reference.prepare_qkv(qkv, *heads, None, None, 0.0, *first, slots)
        yield compare(name, way(x, weight, bias, *heads, *second, slots), expected)
        for ours, theirs in zip(second, first, strict=True):
            yield compare(f"{name} cache", _of_slots(ours, slots), _of_slots(theirs, slots))


def _of_slots(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return cache.transpose(1, 2).flatten(0, 1)[slots]


# ---------------------------------------------------------------- timing


def seconds(launch: Callable[[int], object], copies: int = 1, repeats: int = 5) -> float:
    """Median time of launch(i), i < copies, through a CUDA graph of at least 20 launches."""
    launches = max(20 // copies, 1) * copies
    for index in range(copies):
        launch(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(launches):
            launch(index % copies)
    graph.replay()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / launches / 1e3)
    return sorted(times)[repeats // 2]


def measure_limits(report: Report) -> tuple[float, float]:
    """Copy bandwidth in bytes a second (read plus written) and bf16 matrix rate in operations a second."""
    source = torch.randn(1 << 30, device=DEVICE, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / seconds(lambda _: torch.neg(source, out=target))  # a memory copy in a graph is slow
    a, b = (randn(8192, 8192, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192**3 / seconds(lambda _: a @ b)
    report.show("timing", "limits", copy_TB_s=bandwidth / 1e12, matrix_TFLOP_s=rate / 1e12)
    return bandwidth, rate


def time_all(report: Report) -> None:
    bandwidth, rate = measure_limits(report)
    for rows in (1, 256, 8192):
        time_elementwise(report, bandwidth, rows)
    for rows in (1, 256):
        logits = randn(rows, 128256, dtype=torch.float32)
        elapsed = seconds(lambda _, logits=logits: sampling.argmax(logits))
        show = {"us": elapsed * 1e6, "share": logits.nbytes / elapsed / bandwidth}
        report.show("timing", f"argmax {rows} rows", **show, torch_us=seconds(lambda _, x=logits: x.argmax(1)) * 1e6)
        z = distribution.scaled_logits(logits, logits.amax(1), None)
        filters = torch.full((rows,), 50, device=DEVICE), torch.full((rows,), 0.9, device=DEVICE, dtype=torch.float64)
        elapsed = seconds(lambda _, z=z, filters=filters: sampling.thresholds(z, *filters, None))
        sorted_us = seconds(lambda _, z=z: z.sort(dim=-1, descending=True)) * 1e6
        report.show("timing", f"thresholds {rows} rows", us=elapsed * 1e6, sort_alone_us=sorted_us)
    time_attention(report, bandwidth, rate)
    for outputs, inputs in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):  # of a Llama-3.1-8B layer
        time_linear(report, bandwidth, outputs, inputs)


def time_elementwise(report: Report, bandwidth: float, rows: int) -> None:
    hidden, inner, dtype = 4096, 14336, torch.bfloat16
    weight = randn(hidden, dtype=dtype)
    num_blocks, num_heads, num_kv_heads, size = 1024, 32, 8, 128
    k_cache, v_cache = caches(num_blocks, num_kv_heads, 16, size, dtype)
    cos_sin = torch.randn(16384, size, device=DEVICE)
    x, residual = randn(rows, hidden, dtype=dtype), randn(rows, hidden, dtype=dtype)
    gate_up = randn(rows, 2 * inner, dtype=dtype)
    qkv = randn(rows, (num_heads + 2 * num_kv_heads) * size, dtype=dtype)
    positions = torch.arange(rows, device=DEVICE)
    for name, launch, moved in (
        ("rms_norm", lambda _: kernels.rms_norm(x, weight, 1e-6), 2 * x.nbytes),
        ("add_rms_norm", lambda _: kernels.add_rms_norm(x, residual, weight, 1e-6), 4 * x.nbytes),
        ("silu_mul", lambda _: kernels.silu_mul(gate_up), gate_up.nbytes * 3 // 2),
        (
            "prepare_qkv",
            lambda _: kernels.prepare_qkv(
                qkv, num_heads, num_kv_heads, size, positions, cos_sin, None, None, 0.0, k_cache, v_cache, positions
            ),
            2 * qkv.nbytes,
        ),
    ):
        elapsed = seconds(launch)
        report.show("timing", f"{name} {rows} rows", us=elapsed * 1e6, share=moved / elapsed / bandwidth)


def time_linear(report: Report, bandwidth: float, outputs: int, inputs: int) -> None:
    """Products with weights [outputs, inputs], more of them in turn than the card's own cache holds."""
    copies = max(2, (300 << 20) // (2 * outputs * inputs))
    weights = [randn(outputs, inputs, dtype=torch.bfloat16) for _ in range(copies)]
    eighths = [weight.to(torch.float8_e4m3fn) for weight in weights]
    scales = torch.rand(outputs, device=DEVICE)
    inputs_of = {rows: randn(rows, inputs, dtype=torch.bfloat16) for rows in (1, 4, 16, 32, 64, 256)}
    ways: dict[str, tuple[list[torch.Tensor], Callable[[torch.Tensor, int], object]]] = {
        "library": (weights, lambda x, i: torch.nn.functional.linear(x, weights[i])),
        "ours": (weights, lambda x, i: kernels.linear(x, weights[i])),
        "ours_fp8": (eighths, lambda x, i: gpu_fp8.linear(x, Fp8Weight(eighths[i], scales))),
    }
    for rows, x in inputs_of.items():
        shares = {
            name: read[0].nbytes / seconds(partial(launch, x), copies) / bandwidth
            for name, (read, launch) in ways.items()
            if name == "library" or rows <= (1 if name == "ours_fp8" else 32)
        }
        report.show("timing", f"linear {outputs}x{inputs} {rows} rows", **shares)


class AttentionCase:
    """Llama-3.1-8B's attention with a cache several times the card's own cache."""

    num_heads, num_kv_heads, size, block_size = 32, 8, 128, 16

    def __init__(self, seq_lens: list[int], query_lens: list[int]) -> None:
        blocks = sum(-(-length // self.block_size) for length in seq_lens)
        block_bytes = 2 * self.num_kv_heads * self.block_size * self.size * 2
        self.copies = max(1, min(20, -(-(300 << 20) // (blocks * block_bytes))))
        num_blocks = blocks * self.copies + 1
        self.caches = caches(num_blocks, self.num_kv_heads, self.block_size, self.size, torch.bfloat16)
        whole = random_batch(seq_lens * self.copies, [1] * len(seq_lens) * self.copies, self.block_size, num_blocks)
        one = random_batch(seq_lens, query_lens, self.block_size, num_blocks)
        tables = whole.block_table.split(len(seq_lens))
        self.batches = [Batch(one.positions, one.slots, one.query_start, one.seq_lens, table, one.num_decodes,
                              one.max_query_len, one.max_seq_len) for table in tables]  # fmt: skip
        self.q = randn(sum(query_lens), self.num_heads, self.size, dtype=torch.bfloat16)
        self.out = torch.empty(self.q.shape[0], self.num_heads * self.size, device=DEVICE, dtype=torch.bfloat16)
        self.bytes = 2 * 2 * sum(seq_lens) * self.num_kv_heads * self.size + 2 * self.q.nbytes
        seen = sum(n * (s - n) + n * (n + 1) // 2 for s, n in zip(seq_lens, query_lens, strict=True))
        self.operations = 4 * seen * self.num_heads * self.size

    def decode(self, tuning: DecodeTuning | None = None) -> float:
        scale = self.size**-0.5
        return seconds(
            lambda i: decode_attention(self.q, *self.caches, self.batches[i], scale, None, self.out, tuning),
            self.copies,
        )

    def prefill(self, tuning: PrefillTuning | None = None) -> float:
        scale = self.size**-0.5
        return seconds(
            lambda i: prefill_attention(self.q, *self.caches, self.batches[i], scale, None, self.out, tuning),
            self.copies,
        )


DECODE_CASES = {"1x384": [384], "1x8192": [8192], "1x131072": [131072], "16x384": [384] * 16, "256x384": [384] * 256,
                "256x1024": [1024] * 256, "64x8192": [8192] * 64}  # fmt: skip
PREFILL_CASES = {"1x512": [512], "8x1024": [1024] * 8, "2x4096": [4096] * 2, "1x32768": [32768]}


def time_attention(report: Report, bandwidth: float, rate: float) -> None:
    for name, seq_lens in DECODE_CASES.items():
        case = AttentionCase(seq_lens, [1] * len(seq_lens))
        elapsed = case.decode()
        report.show("timing", f"decode attention {name}", us=elapsed * 1e6, share=case.bytes / elapsed / bandwidth)
    for name, seq_lens in PREFILL_CASES.items():
        case = AttentionCase(seq_lens, seq_lens)
        elapsed = case.prefill()
        achieved = case.operations / elapsed
        report.show(
            "timing", f"prefill attention {name}", us=elapsed * 1e6, TFLOP_s=achieved / 1e12, share=achieved / rate
        )


DECODE_TUNINGS = [
    DecodeTuning(kv_block, min_piece, 32, programs, warps, stages)
    for kv_block, min_piece, programs, warps, stages in (
        (128, 128, 3, 4, 3), (128, 128, 3, 4, 2), (128, 128, 2, 4, 5), (128, 128, 3, 8, 3), (128, 256, 3, 4, 3),
        (128, 128, 6, 4, 3), (64, 128, 3, 4, 3), (64, 128, 3, 4, 5), (32, 128, 4, 4, 3), (32, 128, 4, 2, 5),
    )
]  # fmt: skip
PREFILL_TUNINGS = [
    PrefillTuning(rows, columns, warps, stages)
    for rows, columns, warps, stages in (
        (128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 5), (64, 64, 4, 3), (64, 128, 4, 3),
    )
]  # fmt: skip


def precompile(index: int) -> None:
    """Put one choice's kernels into the compiler's cache on disk, small inputs first."""
    try:
        if index < len(DECODE_TUNINGS):
            for sequences in (1, 256):
                case = AttentionCase([40] * sequences, [1] * sequences)
                decode_attention(case.q, *case.caches, case.batches[0], 1.0, None, case.out, DECODE_TUNINGS[index])
        else:
            case = AttentionCase([200], [200])
            tuning = PREFILL_TUNINGS[index - len(DECODE_TUNINGS)]
            prefill_attention(case.q, *case.caches, case.batches[0], 1.0, None, case.out, tuning)
    except Exception as error:  # a choice that does not fit the card: `tune` says so
        print(f"{index}: {type(error).__name__}", flush=True)


def described(tuning: DecodeTuning | PrefillTuning) -> str:
    return type(tuning).__name__[:-6] + " " + " ".join(str(value) for value in dataclasses.astuple(tuning))


def tune(report: Report) -> None:
    """Microseconds of each choice. Decode: kv_block, min_piece, max_pieces, programs_per_sm, num_warps, num_stages."""
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 4)) as pool:
        pool.map(precompile, range(len(DECODE_TUNINGS) + len(PREFILL_TUNINGS)), chunksize=1)
    names = ("1x384", "1x8192", "16x384", "256x384", "256x1024")
    cases = {name: AttentionCase(DECODE_CASES[name], [1] * len(DECODE_CASES[name])) for name in names}
    for choice in DECODE_TUNINGS:
        try:
            times = {key: round(case.decode(choice) * 1e6, 1) for key, case in cases.items()}
        except Exception as error:
            times = {"failed": str(error).splitlines()[0][:60]}
        report.show("tuning", described(choice), **times)
    prefill = AttentionCase(PREFILL_CASES["2x4096"], PREFILL_CASES["2x4096"])
    for tuning in PREFILL_TUNINGS:
        try:
            rates = {"TFLOP_s": prefill.operations / prefill.prefill(tuning) / 1e12}
        except Exception as error:
            rates = {"failed": str(error).splitlines()[0][:60]}
        report.show("tuning", described(tuning), **rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="kernels,timing,tuning,engine,long,speed,profile")
    parser.add_argument("--rounds", type=int, default=24, help="random shapes that every kernel is checked on")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "big"))
    parser.add_argument("--shapes", default=",".join(gpu_engine.SHAPES), help="models whose speed is measured")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = Report(set(options.only.split(",")), options.json)
    place = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU (interpreter)"
    print(f"{place}; torch {torch.__version__}; seed {options.seed}", flush=True)
    report.part("kernels", lambda: check_kernels(report, options.rounds, options.seed))
    report.part("engine", lambda: gpu_engine.check_engine(report))
    report.part("long", lambda: gpu_engine.check_long(report))
    if DEVICE.type == "cuda":
        profiled = "profile" in report.sections
        for shape in options.shapes.split(","):
            report.part("speed", lambda shape=shape: gpu_engine.measure_speed(report, shape, profiled))
        report.part("timing", lambda: time_all(report))
        report.part("tuning", lambda: tune(report))
    print("failures:", report.failures or "none")
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
