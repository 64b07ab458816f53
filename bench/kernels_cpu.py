"""How near the native CPU kernels come to what this machine can do.

Every line is measured next to the yardsticks (read bandwidth, multiply-adds a second), in turns, so that a machine that
others use at the same time is the same machine for both. `python bench/kernels_cpu.py [--threads 2] [--isa avx2]`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from trine.kernels import cpu
from trine.kernels.cpu.native import load

# Qwen2.5-0.5B: name, N, K, gate and up fused.
LINEARS = (
    ("qkv", 1152, 896, False),
    ("o", 896, 896, False),
    ("gate_up", 9728, 896, True),
    ("down", 896, 4864, False),
    ("lm_head", 151936, 896, False),
)
ROUNDS = 7


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Yardstick:
    """Read bandwidth in bytes a second and multiply-adds in operations a second, of all threads together."""

    def __init__(self) -> None:
        native, status = load()
        assert native is not None, status
        self.native = native
        self.memory = torch.zeros(256 << 20, dtype=torch.uint8)

    def bandwidth(self) -> float:
        size = self.memory.numel()
        return size / seconds(lambda: self.native.trine_probe_read(self.memory.data_ptr(), size))

    def flops(self) -> float:
        tasks, start = 32, time.perf_counter()
        operations = self.native.trine_probe_fma(tasks, 40_000)
        return float(tasks * operations / (time.perf_counter() - start))


def linear(yardstick: Yardstick, dtype: torch.dtype, int8: bool, rows: int, only: str) -> None:
    """One line a weight: time, bandwidth, flops, and their shares of the yardsticks (medians of the ratios)."""
    for name, n, k, fused in LINEARS:
        if only and only != name:
            continue
        copies = max(1, (96 << 20) // (n * k * 2)) if rows <= 32 else 1  # together larger than the caches
        plain = torch.randn(n, k).to(dtype)
        weights = [cpu.pack_int8(plain) if int8 else cpu.pack_weight(plain) for _ in range(copies)]
        x = torch.randn(rows, k).to(dtype)
        run = cpu.linear_silu_mul if fused else cpu.linear
        repeats = max(1, int(2e9 / (2 * rows * n * k * copies)))

        def work(weights: list[cpu.PackedWeight] = weights, x: torch.Tensor = x) -> None:
            for _ in range(repeats):  # noqa: B023
                for weight in weights:
                    run(x, weight)  # noqa: B023

        work()
        times, reads, flops = [], [], []
        for _ in range(ROUNDS):
            bandwidth, peak = yardstick.bandwidth(), yardstick.flops()
            duration = seconds(work) / (repeats * copies)
            times.append(duration)
            reads.append(weights[0].nbytes / duration / bandwidth)
            flops.append(2 * rows * n * k / duration / peak)
        best = min(times)
        print(
            f"{'int8' if int8 else str(dtype)[6:]:>8} {name:>8} rows {rows:>4}: {best * 1e6:9.1f} µs best"
            f" {weights[0].nbytes / best / 1e9:6.1f} GB/s ({statistics.median(reads):5.1%} of read)"
            f" {2 * rows * n * k / best / 1e9:7.1f} GFLOP/s ({statistics.median(flops):5.1%} of multiply-adds)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", default="")
    parser.add_argument("--rows", default="1,8,32,128")
    parser.add_argument("--only", default="", help="one of the linear layers")
    parser.add_argument("--dtypes", default="bfloat16,int8")
    options = parser.parse_args()
    if options.isa and not cpu.set_isa(options.isa):
        parser.error(f"--isa {options.isa}: this processor can't run it")
    cpu.set_num_threads(options.threads)
    yardstick = Yardstick()
    print(f"{cpu.status()}: read {yardstick.bandwidth() / 1e9:.1f} GB/s, {yardstick.flops() / 1e9:.0f} GFLOP/s")
    for dtype in options.dtypes.split(","):
        for rows in map(int, options.rows.split(",")):
            linear(
                yardstick,
                torch.bfloat16 if dtype == "int8" else getattr(torch, dtype),
                dtype == "int8",
                rows,
                options.only,
            )


if __name__ == "__main__":
    main()
