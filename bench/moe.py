"""The mixture-of-experts kernels: right against the reference, and each one's time as a share of what the card can do.

    python bench/moe.py [--only kernels,timing,tuning] [--json FILE]

kernels  the router and whole mixtures against trine.kernels.reference on random shapes, every plan
timing   Qwen3-30B-A3B's layer for 1 to 8,192 tokens with random routing: each kernel's share of copy bandwidth or of
         the matrix rate measured in the same run, and torch's grouped product beside them
tuning   the free choices of the grouped products, timed
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from gpu_check import Check, measure_limits, randn, seconds
from gpu_report import Report

from trine.kernels import reference
from trine.kernels.fp8 import Fp8Weight, pack_fp8
from trine.kernels.triton import moe
from trine.kernels.triton.moe_grouped import Tuning, matrix_product, stream_product
from trine.kernels.triton.moe_route import Groups, Lists, group, route
from trine.kernels.types import AddNorm, Mixture

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of ‖out − ref‖ / ‖ref‖
HIDDEN, INNER, NUM_EXPERTS, TOP_K = 2048, 768, 128, 8  # Qwen3-30B-A3B
EPS = 1e-6
ROWS = (1, 2, 16, 64, 256, 1024, 2048, 8192)


# ---------------------------------------------------------------- right or wrong


def error_of(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def check_round(seed: int) -> list[Check]:
    """Every kernel once, on shapes and values that follow from `seed`."""
    chooser = random.Random(seed)
    torch.manual_seed(seed)
    dtype = chooser.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
    hidden, inner = chooser.choice([(64, 48), (2048, 768), (1000, 200), (1024, 3584), (100, 68)])
    num_experts = chooser.choice([4, 8, 17, 128])
    top_k = chooser.choice([1, 2, min(8, num_experts)])
    rows = chooser.choice([1, 1, 2, 7, 16, 33, 70, 256, 700, 3000])
    x, residual = randn(rows, hidden, dtype=dtype), randn(rows, hidden, dtype=dtype)
    gate = randn(num_experts, hidden, dtype=dtype) * hidden**-0.5
    norms = [1 + 0.1 * randn(hidden, dtype=dtype) for _ in range(2)]
    normalize = chooser.random() < 0.5
    name = str(dtype).removeprefix("torch.")
    summed = residual.clone()
    y = reference.add_rms_norm(x, summed, norms[0], EPS)
    weights, chosen = route(y, gate, top_k, normalize)
    found = []
    expected = reference.route(y, gate, top_k, normalize)
    found.append((f"route weights {name}", error_of(weights, expected[0]), 1e-4))
    # near ties may go either way: what was chosen must weigh what the reference's choice weighs
    p = (y.double() @ gate.double().T).softmax(1)
    found.append((f"route choice {name}", error_of(p.gather(1, chosen.long()), p.gather(1, expected[1].long())), 1e-4))
    gate_up = randn(num_experts, 2 * inner, hidden, dtype=dtype) * hidden**-0.5
    down = randn(num_experts, hidden, inner, dtype=dtype) * inner**-0.5
    plans: list[moe.Plan | None] = [None]
    if dtype.itemsize == 2:
        plans += [plan for _, plan in moe.PLANS] + [moe.MANY_STREAMED]
        plans += [moe.MANY] if hidden % 8 == 0 and inner % 8 == 0 else []
    eighths = [rounded(weight) for weight in (gate_up, down)]
    wide = [widened(weight, dtype) for weight in eighths]
    cases = [(gate_up, down, gate_up, down, plan) for plan in plans] + [(*eighths, *wide, None)]
    for own_gate_up, own_down, plain_gate_up, plain_down, plan in cases:
        wanted = reference.experts(y, plain_gate_up, plain_down, weights, chosen)
        own = moe.mixture(
            None, AddNorm(summed, norms[0], EPS), Mixture(gate, own_gate_up, own_down, top_k, normalize), None, plan
        )
        kind = "by rows" if plan is None else f"{plan.row_block} {'resident' if plan.resident else 'stream'}"
        kind += " float8" if isinstance(own_gate_up, Fp8Weight) else ""
        found.append((f"mixture {kind} {name}", error_of(own, wanted), TOLERANCE[dtype]))
    wanted = reference.add_rms_norm(reference.experts(y, gate_up, down, weights, chosen), summed, norms[1], EPS)
    before, after = (AddNorm(residual, norm, EPS) for norm in norms)
    own = moe.mixture(x, before, Mixture(gate, gate_up, down, top_k, normalize), after)
    found.append((f"between additions {name}", error_of(own, wanted), TOLERANCE[dtype]))
    found.append((f"residual {name}", error_of(residual, summed), TOLERANCE[dtype]))
    return found


def rounded(weight: torch.Tensor) -> Fp8Weight:
    """weight [E, N, K] as float8 with a scale a row."""
    flat = pack_fp8(weight.flatten(0, 1))
    return Fp8Weight(flat.values.view(weight.shape), flat.scales.view(weight.shape[:2]))


def widened(weight: Fp8Weight, dtype: torch.dtype) -> torch.Tensor:
    return (weight.values.float() * weight.scales[:, :, None]).to(dtype)


def check_kernels(report: Report, rounds: int, seed: int) -> None:
    """Rounds side by side in processes: most of their time is the compiler's."""
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 4)) as pool:
        checks = [check for found in pool.imap_unordered(check_round, range(seed, seed + rounds)) for check in found]
    for name in sorted({name for name, _, _ in checks}):
        errors = [error for own, error, _ in checks if own == name]
        worst = next((e for e in errors if not math.isfinite(e)), max(errors))
        report.show("kernels", name, checks=len(errors), worst=worst)
    for name, error, allowed in checks:
        if not error <= allowed:
            report.fail(f"{name}: error {error:.2e}")


# ---------------------------------------------------------------- timing


@dataclass
class Layer:
    """One layer's weights and, for a number of rows, inputs with several routings: no routing's weights stay cached."""

    gate: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up8: Fp8Weight
    down8: Fp8Weight

    @staticmethod
    def random(num_experts: int = NUM_EXPERTS) -> Layer:
        gate, gate_up, down = (
            randn(num_experts, *shape, dtype=torch.bfloat16) * shape[-1] ** -0.5
            for shape in ((HIDDEN,), (2 * INNER, HIDDEN), (HIDDEN, INNER))
        )
        return Layer(gate, gate_up, down, rounded(gate_up), rounded(down))


class Case:
    """Rows with random routings of a layer; `Groups` for a row block."""

    def __init__(self, layer: Layer, rows: int) -> None:
        self.layer, self.rows = layer, rows
        self.eighths = layer.gate_up8, layer.down8
        self.copies = 20 if rows <= 16 else 4
        self.x = [randn(rows, HIDDEN, dtype=torch.bfloat16) for _ in range(self.copies)]
        self.routes = [route(x, layer.gate, TOP_K, True) for x in self.x]
        self.h = randn(rows * TOP_K, INNER, dtype=torch.bfloat16)
        self.y = randn(rows * TOP_K, HIDDEN, dtype=torch.bfloat16)
        active = sum(len(chosen.unique()) for _, chosen in self.routes) / self.copies
        pairs = rows * TOP_K
        self.active = active
        self.gate_up_bytes = active * layer.gate_up[0].nbytes + 2 * pairs * (HIDDEN + INNER)
        self.down_bytes = active * layer.down[0].nbytes + 2 * pairs * (HIDDEN + INNER)
        self.operations = 2 * pairs * INNER * HIDDEN  # of one of the three products

    def groups(self, row_block: int) -> list[Groups]:
        return [group(chosen, self.layer.gate.shape[0], row_block) for _, chosen in self.routes]

    def lists(self) -> list[Lists]:
        """Each routing's choices by expert, with counts of their own: they are not set back between launches."""
        num_experts = self.layer.gate.shape[0]
        found = []
        for _, chosen in self.routes:
            counts = chosen.view(-1).bincount(minlength=num_experts)
            numbers = chosen.view(-1).argsort(stable=True)
            rank = torch.arange(len(numbers), device=DEVICE) - (counts.cumsum(0) - counts).repeat_interleave(counts)
            choices = torch.zeros((num_experts, self.rows), dtype=torch.int32, device=DEVICE)
            choices[chosen.view(-1)[numbers].long(), rank] = numbers.to(torch.int32)
            used = torch.full((1,), self.rows, dtype=torch.int32, device=DEVICE)
            found.append(Lists(counts.to(torch.int32), choices, used))
        return found

    def time(self, launch: Callable[[int], object]) -> float:
        return seconds(launch, self.copies)

    def products(self, plan: moe.Plan) -> tuple[float, float]:
        """Seconds of gate-and-up and of down with one choice; infinite where it can't run."""
        times = []
        for silu in (True, False):
            try:
                times.append(self.time(self._resident(plan, silu) if plan.resident else self._stream(plan, silu)))
            except Exception as error:  # a choice that does not fit the card
                print(f"            {plan} {silu}: {str(error).splitlines()[0][:80]}", flush=True)
                times.append(math.inf)
        return times[0], times[1]

    def _stream(self, plan: moe.Plan, silu: bool) -> Callable[[int], object]:
        x, weight = (self.x, self.layer.gate_up) if silu else ([self.h] * self.copies, self.layer.down)
        lists, choices, tuning = self.lists(), TOP_K if silu else 1, plan.gate_up if silu else plan.down
        shape = self.rows * TOP_K, choices, plan.row_block, tuning
        return lambda i: stream_product(x[i], weight, lists[i], *shape, silu=silu)

    def _resident(self, plan: moe.Plan, silu: bool) -> Callable[[int], object]:
        groups, x = self.groups(plan.row_block), [self.h] * self.copies
        if silu:
            x = [moe.gather_rows(own, sort, TOP_K) for own, sort in zip(self.x, groups, strict=True)]
        weight, tuning = (self.layer.gate_up, plan.gate_up) if silu else (self.layer.down, plan.down)
        return lambda i: matrix_product(x[i], weight, groups[i], tuning, silu=silu)


def time_all(report: Report) -> None:
    bandwidth, rate = measure_limits(report)
    layer = Layer.random()
    for rows in ROWS:
        time_rows(report, Case(layer, rows), bandwidth, rate)


def time_rows(report: Report, case: Case, bandwidth: float, rate: float) -> None:
    layer, rows = case.layer, case.rows
    plan = moe.plan_for(rows * TOP_K, layer.gate_up, torch.bfloat16)
    moved = case.active * (layer.gate_up[0].nbytes + layer.down[0].nbytes)
    moved_rows = 2 * rows * (TOP_K + 1) * HIDDEN

    def show(name: str, launch: Callable[[int], object], least: float) -> None:
        elapsed = case.time(launch)
        report.show("timing", f"{rows} rows {name}", us=elapsed * 1e6, share=least / elapsed)

    show("route", lambda i: route(case.x[i], layer.gate, TOP_K, True), layer.gate.nbytes / bandwidth)
    if rows > 1:
        sorts: list[Groups] | list[Lists] = case.groups(plan.row_block) if plan.resident else case.lists()
        if plan.resident:
            groups = case.groups(plan.row_block)
            show("group", lambda i: group(case.routes[i][1], NUM_EXPERTS, plan.row_block), 0.0)
            show("gather", lambda i: moe.gather_rows(case.x[i], groups[i], TOP_K), moved_rows / bandwidth)
        gate_up, down = case.products(plan)
        for name, elapsed, moved_here, products in (
            ("gate_up", gate_up, case.gate_up_bytes, 2), ("down", down, case.down_bytes, 1),
        ):  # fmt: skip
            shares = {"share": moved_here / elapsed / bandwidth, "matrix": products * case.operations / elapsed / rate}
            report.show("timing", f"{rows} rows {name}", us=elapsed * 1e6, **shares)
        show("combine", lambda i: moe.combine(case.y, sorts[i], case.routes[i][0]), moved_rows / bandwidth)
    before = AddNorm(torch.zeros_like(case.x[0]), torch.ones(HIDDEN, dtype=torch.bfloat16, device=DEVICE), EPS)
    for name, pair, share in (("", (layer.gate_up, layer.down), 1.0), (" float8", case.eighths, 0.5)):
        mixture = Mixture(layer.gate, *pair, TOP_K, True)
        elapsed = case.time(lambda i, own=mixture: moe.mixture(case.x[i], before, own, before))
        shares = {"share": share * moved / elapsed / bandwidth, "matrix": 3 * case.operations / elapsed / rate}
        report.show("timing", f"{rows} rows whole{name}", us=elapsed * 1e6, active=case.active, **shares)
    if rows >= 256:
        time_library(report, case, rate)


def time_library(report: Report, case: Case, rate: float) -> None:
    """torch's grouped product on rows that are sorted already."""
    groups = case.groups(128)
    sorted_rows = [moe.gather_rows(x, g, TOP_K) for x, g in zip(case.x, groups, strict=True)]
    up, down = (weight.transpose(1, 2) for weight in (case.layer.gate_up, case.layer.down))
    for name, source, weight, products in (("gate_up", sorted_rows, up, 2), ("down", [case.h] * case.copies, down, 1)):
        try:
            elapsed = case.time(lambda i, s=source, w=weight: torch._grouped_mm(s[i], w, offs=groups[i].ends))
        except Exception as error:
            report.show("timing", f"{case.rows} rows library {name}", failed=str(error).splitlines()[0][:80])
            continue
        share = products * case.operations / elapsed / rate
        report.show("timing", f"{case.rows} rows library {name}", us=elapsed * 1e6, matrix=share)


# ---------------------------------------------------------------- tuning

STREAM_ROWS = {16: (16,), 256: (32, 64)}
STREAM_TUNINGS = [
    Tuning(*choice)
    for choice in (
        (64, 64, 4, 4), (64, 64, 4, 6), (64, 128, 4, 2), (64, 128, 4, 3), (64, 128, 4, 4), (32, 128, 4, 4),
        (128, 64, 4, 4), (128, 64, 8, 4), (128, 128, 8, 3),
    )
]  # fmt: skip
MATRIX_ROWS = {2048: (64, 128), 8192: (64, 128)}
MATRIX_TUNINGS = [
    Tuning(*choice)
    for choice in (
        (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 4), (128, 128, 8, 2), (256, 64, 8, 3), (256, 64, 8, 4),
        (64, 64, 4, 4),
    )
]  # fmt: skip


def plans() -> Iterator[tuple[int, moe.Plan]]:
    """Rows, and a plan in which both products have the same choice: everything that is timed."""
    for blocks, resident, tunings in ((STREAM_ROWS, False, STREAM_TUNINGS), (MATRIX_ROWS, True, MATRIX_TUNINGS)):
        for rows, row_blocks in blocks.items():
            for row_block, tuning in itertools.product(row_blocks, tunings):
                yield rows, moe.Plan(row_block, tuning, tuning, resident)


def precompile(plan: moe.Plan) -> None:
    """Put one plan's kernels into the compiler's cache on disk."""
    Case(Layer.random(16), 32).products(plan)


def tune(report: Report) -> None:
    """Microseconds of gate-and-up and of down for each choice, with the row block and for the rows in the name."""
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 2)) as pool:
        pool.map(precompile, sorted({plan for _, plan in plans()}, key=str), chunksize=2)
    layer = Layer.random()
    for rows, same_rows in itertools.groupby(plans(), key=lambda own: own[0]):
        case = Case(layer, rows)
        for row_block, same_block in itertools.groupby(same_rows, key=lambda own: own[1].row_block):
            times = {plan: case.products(plan) for _, plan in same_block}
            for at, name in enumerate(("gate_up", "down")):
                ranked = sorted((own[at], str(astuple(plan.gate_up)).replace(" ", "")) for plan, own in times.items())
                listed = {choice: round(elapsed * 1e6, 1) for elapsed, choice in ranked if elapsed < math.inf}
                kind = "matrix" if next(iter(times)).resident else "stream"
                report.show("tuning", f"{kind} {rows} rows by {row_block} {name}", **listed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="kernels,timing,tuning")
    parser.add_argument("--rounds", type=int, default=24, help="random shapes that every kernel is checked on")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "big"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = Report(set(options.only.split(",")), options.json)
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}; seed {options.seed}", flush=True)
    report.part("kernels", lambda: check_kernels(report, options.rounds, options.seed))
    report.part("timing", lambda: time_all(report))
    report.part("tuning", lambda: tune(report))
    print("failures:", report.failures or "none")
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
