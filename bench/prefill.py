"""Prefill and float8 on a GPU: each kernel against its reference, and beside the library in the same run.

    python bench/prefill.py [--only kernels,attention,gated,products,rounding] [--json FILE]

kernels    the Hopper attention and gated-product kernels and the float8 kernels against references, random shapes
attention  prefill attention of several shapes and cache blocks, cuDNN's beside it, as a share of the matrix rate
gated      8,192 rows through gate, up and SiLU: one kernel, and the library's product with the activation after it,
           half a second each, since the card's power bounds both
products   the float8 products of a Llama-3.1-8B layer, ours and the library's, as a share of copy speed
rounding   norms and activations that leave float8 rows, as a share of copy speed
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gpu_check
import torch
from gpu_check import AttentionCase, caches, randn, random_batch, seconds
from gpu_report import Report
from torch.nn.functional import linear, scaled_dot_product_attention

from trine.kernels import fp8, reference
from trine.kernels.triton import fp8 as kernels
from trine.kernels.triton.activation import silu_mul
from trine.kernels.triton.gated_linear import fused
from trine.kernels.triton.hopper_attention import hopper_prefill_attention
from trine.kernels.triton.parts import in_parts

BF16 = torch.bfloat16
LAYER = {"qkv": (6144, 4096), "output": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
PROMPTS = {"1x512": [512], "8x1024": [1024] * 8, "2x4096": [4096] * 2, "1x32768": [32768]}
HEADS = {"32 of 128": (32, 8, 128), "14 of 64": (14, 2, 64)}


# ---------------------------------------------------------------- right or wrong


def check(report: Report, name: str, actual: torch.Tensor, expected: torch.Tensor, allowed: float) -> None:
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    report.show("kernels", name, error=error)
    if not error <= allowed:
        report.fail(f"{name}: error {error:.2e}")


def check_attention(report: Report, chooser: random.Random) -> None:
    num_kv_heads, group, size = chooser.choice([1, 2, 8]), chooser.choice([1, 4, 5, 7]), chooser.choice([64, 128])
    block_size, window = chooser.choice([16, 32, 64, 128]), chooser.choice([None, 100, 700])
    chunks = [(chooser.randint(2, 900), chooser.choice([0, 33, 700])) for _ in range(chooser.choice([1, 3, 40]))]
    seq_lens, query_lens = [300, *(new + old for new, old in chunks)], [1, *(new for new, _ in chunks)]
    num_blocks = sum(-(-length // block_size) for length in seq_lens) + 5
    batch = random_batch(seq_lens, query_lens, block_size, num_blocks, chooser.randint(0, 1 << 30))
    q = randn(sum(query_lens), num_kv_heads * group, size, dtype=BF16)
    k_cache, v_cache = caches(num_blocks, num_kv_heads, block_size, size, BF16)
    expected = reference.paged_attention(q, k_cache, v_cache, batch, size**-0.5, window)
    actual = torch.full_like(expected, torch.nan)
    hopper_prefill_attention(q, k_cache, v_cache, batch, size**-0.5, window, actual)
    shape = f"{num_kv_heads}x{group} heads of {size}, blocks of {block_size}, window {window}, {len(chunks)} chunks"
    check(report, f"attention {shape}", actual[1:], expected[1:], 1e-2)


def check_float8(report: Report, chooser: random.Random) -> None:
    rows, inputs, inner = chooser.choice([2, 30, 64, 100, 250, 300, 3000]), chooser.choice([256, 896, 4096]), 128 * 11
    x, weight = randn(rows, inputs, dtype=BF16), randn(2 * inner, inputs, dtype=BF16) * 0.05
    rounded, packed = kernels.quantize_rows(x), fp8.pack_fp8(weight)
    name = f"{rows}x{inputs} to {inner}"
    check(report, f"quantize_rows {name}", rounded.dequantize(), fp8.quantize_rows(x).dequantize(), 1e-3)
    check(report, f"float8 linear {name}", kernels.linear(rounded, packed), fp8.linear(rounded, packed), 1e-2)
    gated = kernels.linear_silu_mul_rows(rounded, packed)
    check(report, f"float8 gated {name}", gated.dequantize(), fp8.linear_silu_mul(rounded, packed), 4e-2)
    exact = reference.silu_mul(reference.linear(x.double(), weight.double()))
    one = fused(x, weight, None)
    if one is not None:
        check(report, f"gated {name}", one, exact, 1e-2)
    for kind, own, reader in (("bf16", x, weight), ("float8", rounded, packed)):
        parts = in_parts(own, reader, None)
        if parts is not None:
            expected = x.double() @ weight.double().T if kind == "bf16" else fp8.linear(rounded, packed)
            check(report, f"{kind} in parts {name}", parts.double().sum(0)[:rows], expected, 1e-2)


def check_kernels(report: Report, rounds: int, seed: int) -> None:
    for number in range(seed, seed + rounds):
        torch.manual_seed(number)
        check_attention(report, random.Random(number))
        check_float8(report, random.Random(number))


# ---------------------------------------------------------------- timing


def time_attention(report: Report, rate: float) -> None:
    for heads, (num_heads, num_kv_heads, size) in HEADS.items():
        for prompts, lengths in PROMPTS.items():
            for block_size in (16, 64, 128):
                case = Case(lengths, num_heads, num_kv_heads, size, block_size)
                achieved = case.operations / case.prefill()
                name = f"{prompts}, {heads}, blocks of {block_size}"
                report.show("attention", name, TFLOP_s=achieved / 1e12, share=achieved / rate)
            q = randn(len(lengths), num_heads, lengths[0], size, dtype=BF16)
            k, v = (randn(len(lengths), num_kv_heads, lengths[0], size, dtype=BF16) for _ in range(2))
            library = partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
                achieved = case.operations / seconds(lambda _, run=library: run())
            report.show("attention", f"{prompts}, {heads}, cuDNN", TFLOP_s=achieved / 1e12, share=achieved / rate)


class Case(AttentionCase):
    """The same with other heads and cache blocks."""

    def __init__(self, lengths: list[int], num_heads: int, num_kv_heads: int, size: int, block_size: int) -> None:
        self.num_heads, self.num_kv_heads, self.size, self.block_size = num_heads, num_kv_heads, size, block_size
        super().__init__(lengths, lengths)


def sustained(run: Callable[[], object], duration: float = 0.5) -> float:
    """Seconds of one run among many, for `duration`: what the card's power allows rather than what a burst reaches."""
    run()
    torch.cuda.synchronize()
    start, count = perf_counter(), 0
    while perf_counter() - start < duration:
        for _ in range(10):
            run()
        torch.cuda.synchronize()
        count += 10
    return (perf_counter() - start) / count


def time_gated(report: Report) -> None:
    x, weight = randn(8192, 4096, dtype=BF16), randn(28672, 4096, dtype=BF16) * 0.02
    rounded, packed = kernels.quantize_rows(x), fp8.pack_fp8(weight)
    ways: dict[str, Callable[[], object]] = {
        "bf16 library's product": lambda: linear(x, weight),
        "bf16 library's product, silu_mul": lambda: silu_mul(linear(x, weight)),
        "bf16 one kernel": lambda: fused(x, weight, None),
        "fp8 library's product, silu_mul_rows": lambda: kernels.silu_mul_rows(kernels.linear(rounded, packed)),
        "fp8 one kernel, quantize_rows": lambda: kernels.linear_silu_mul_rows(rounded, packed),
    }
    for repeat in range(2):
        for name, run in ways.items():
            report.show("gated", f"{name}, {repeat}", us=sustained(run) * 1e6)


def library_product(x: fp8.Fp8Rows, weight: fp8.Fp8Weight) -> torch.Tensor:
    return torch._scaled_mm(
        x.values, weight.values.t(), scale_a=x.scales, scale_b=weight.scales[None],
        out_dtype=BF16, use_fast_accum=True,
    )  # fmt: skip


def own_product(x: fp8.Rows, weight: fp8.Fp8Weight) -> torch.Tensor:
    """A whole product, or parts of one for the kernel behind to sum up."""
    parts = in_parts(x, weight, None)
    return kernels.linear(x, weight) if parts is None else parts


def time_products(report: Report, bandwidth: float) -> None:
    """With more weights in turn than the card's own cache holds. Ours takes one row as it is."""
    for name, (outputs, inputs) in LAYER.items():
        copies = max(2, (250 << 20) // (outputs * inputs))
        weights = [fp8.pack_fp8(randn(outputs, inputs, dtype=BF16) * 0.02) for _ in range(copies)]
        for rows in (1, 2, 16, 64, 256, 8192):
            plain = randn(rows, inputs, dtype=BF16)
            rounded = kernels.quantize_rows(plain)
            figures: dict[str, float] = {}
            for way in ("library", "ours") if rows <= 256 else ("library",):
                if way == "library":
                    launches = [partial(library_product, rounded, weight) for weight in weights]
                else:
                    launches = [partial(own_product, plain if rows == 1 else rounded, weight) for weight in weights]
                elapsed = seconds(lambda i, launches=launches: launches[i](), copies)
                figures |= {f"{way}_us": elapsed * 1e6, f"{way}_share": outputs * inputs / elapsed / bandwidth}
            report.show("products", f"{name} {rows} rows", **figures)


def time_rounding(report: Report, bandwidth: float) -> None:
    for rows in (16, 256, 8192):
        x, residual, weight = randn(rows, 4096, dtype=BF16), randn(rows, 4096, dtype=BF16), randn(4096, dtype=BF16)
        gate_up = randn(rows, 28672, dtype=BF16)
        for name, run, moved in (
            ("quantize_rows", lambda _, x=x: kernels.quantize_rows(x), 3 * x.numel()),
            (
                "add_rms_norm_rows",
                lambda _, x=x, r=residual, w=weight: kernels.add_rms_norm_rows(x, r, w, 1e-5),
                7 * x.numel(),
            ),
            ("silu_mul_rows", lambda _, x=gate_up: kernels.silu_mul_rows(x), gate_up.numel() * 5 // 2),
        ):
            elapsed = seconds(run)
            report.show("rounding", f"{name} {rows} rows", us=elapsed * 1e6, share=moved / elapsed / bandwidth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="kernels,attention,gated,products,rounding")
    parser.add_argument("--rounds", type=int, default=6, help="random shapes that the kernels are checked on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        sys.exit("this needs a Hopper GPU")
    report = Report({"timing", *options.only.split(",")}, options.json)
    report.part("kernels", lambda: check_kernels(report, options.rounds, options.seed))
    bandwidth, rate = gpu_check.measure_limits(report)
    report.part("attention", lambda: time_attention(report, rate))
    report.part("gated", lambda: time_gated(report))
    report.part("products", lambda: time_products(report, bandwidth))
    report.part("rounding", lambda: time_rounding(report, bandwidth))
    print("failures:", report.failures or "none")
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
