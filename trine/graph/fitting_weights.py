"""Weights in 8 bits, such that AVX2 may add their products with bytes in 16 bits.

There, one instruction multiplies bytes and adds two neighbouring products in 16 bits, and another widens such sums to
32. Four products fit, too, where the weights of one sign among them sum to 128 at most: then half of the widening
goes, and with it a quarter of what the multipliers do. Weights that are spread as usual lose little by it; those that
are not are left to fit in twos. A plan's integers are the same on all machines.
"""

from __future__ import annotations

import torch

TOGETHER = 4
"""Products that are added in 16 bits where they fit."""
LARGEST_SUM = 128
"""What weights of one sign that are added may sum to: 255 times that fits 16 bits."""
_LEAST_DECIBELS = 34.0
"""Weights that are rounded more coarsely than that (signal to noise) to fit in fours are left to fit in twos."""
_FACTORS = {2: (1.0, 1.2, 1.5, 2.0), 4: (1.2, 1.5, 1.8, 2.2, 2.7, 3.3, 4.0)}
_ROWS_AT_ONCE = 1 << 18  # elements: what a pass makes of them stays in the cache


def in_order(data: torch.Tensor) -> torch.Tensor:
    """Weights [filters, channels, ...] as [filters, k] in the order of the kernels: channels innermost."""
    return (data.movedim(1, -1) if data.dim() > 2 else data).flatten(1)


def together(rows: torch.Tensor, count: int) -> torch.Tensor:
    """[filters, k] as [filters, groups, count]: 2 neighbours, or two steps of four's (2 i, 2 i + 1) of both."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8)).view(len(rows), -1, 2, 2, 2)
    return (padded.transpose(2, 3) if count == 4 else padded).reshape(len(rows), -1, count)


def apart(groups: torch.Tensor, depth: int) -> torch.Tensor:
    """The inverse of `together`."""
    count = groups.shape[-1]
    parts = groups.view(len(groups), -1, 2, 2, 2)
    return (parts.transpose(2, 3) if count == 4 else parts).reshape(len(groups), -1)[:, :depth]


def fitting(data: torch.Tensor) -> int:
    """How many products of these int8 weights with bytes fit 16 bits together: 4, 2 or 1."""
    rows = in_order(data)
    return next((count for count in (4, 2) if _fits(rows, count)), 1)


def _fits(rows: torch.Tensor, count: int) -> bool:
    for part in rows.split(max(1, _ROWS_AT_ONCE // rows.shape[1])):
        groups = together(part, count).to(torch.int16)
        largest = torch.maximum(groups.clamp(min=0).sum(2), -groups.clamp(max=0).sum(2))
        if int(largest.max()) > LARGEST_SUM:
            return False
    return True


def rounded(data: torch.Tensor, *, depthwise: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 weights like the float32 `data` [filters, ...] and each filter's scale: they fit in fours, or in twos."""
    rows = in_order(data)
    largest = rows.abs().amax(1)
    finest = torch.where(largest > 0, largest, torch.ones_like(largest)) / 127
    parts = list(zip(*(x.split(max(1, _ROWS_AT_ONCE // rows.shape[1])) for x in (rows, finest)), strict=True))
    for count in (2,) if depthwise else (4, 2):
        found = [_nearest(part, own, count) for part, own in parts]
        noise = sum(float(error.sum()) for _, _, error in found)
        if count == 2 or noise * 10 ** (_LEAST_DECIBELS / 10) <= float((rows.double() ** 2).sum()):
            break
    stored, scales = torch.cat([item[0] for item in found]), torch.cat([item[1] for item in found])
    if data.dim() > 2:
        stored = stored.view(len(data), *data.shape[2:], data.shape[1]).movedim(-1, 1)
    return stored.contiguous(), scales


def _nearest(rows: torch.Tensor, finest: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers, scales, squared errors: of a few scales each filter gets the one that moves its weights least.

    That is a coarser one, or a finer one that cuts the groups with the largest sums.
    """
    groups = together(rows, count)
    best, chosen = torch.zeros_like(groups), finest
    least = torch.full_like(finest, float("inf"))
    for factor in _FACTORS[count]:
        scales = finest * factor
        exact = groups / scales[:, None, None]
        whole = exact.round()
        for sign in (1, -1):
            _hold(exact, whole, sign)
        error = (whole - exact).square_().sum((1, 2)) * scales**2
        better = error < least
        least, chosen = torch.where(better, error, least), torch.where(better, scales, chosen)
        best = torch.where(better[:, None, None], whole, best)
    return apart(best, rows.shape[1]).to(torch.int8), chosen, least


def _hold(exact: torch.Tensor, whole: torch.Tensor, sign: int) -> None:
    """Bring down, in place, what is of one sign in groups that sum to more than LARGEST_SUM."""
    over = (whole * sign).clamp_(min=0).sum(2) > LARGEST_SUM
    if over.any():
        own = whole[over]
        held = _within(exact[over] * sign)
        whole[over] = torch.where(own * sign > 0, held * sign, own)


def _within(exact: torch.Tensor) -> torch.Tensor:
    """Whole numbers of at least 0 near `exact` [groups, count], LARGEST_SUM together at most.

    The nearest point whose positive coordinates sum to that takes the same off each (Held, Wolfe and Crowder,
    "Validation of subgradient optimization", 1974); what rounding adds is taken back where it added most.
    """
    count = exact.shape[1]
    exact = exact.clamp(min=0)
    falling = exact.sort(1, descending=True).values
    off = (falling.cumsum(1) - LARGEST_SUM) / torch.arange(1, count + 1)
    last = (falling > off).sum(1, keepdim=True).clamp(min=1) - 1
    target = (exact - off.gather(1, last).clamp(min=0)).clamp(min=0)
    whole = target.round()
    for _ in range(count // 2):
        excess = torch.where(whole > 0, whole - target, whole.new_tensor(-2.0))
        too_much = (whole.sum(1, keepdim=True) > LARGEST_SUM).to(whole.dtype)
        whole.scatter_add_(1, excess.argmax(1, keepdim=True), -too_much)
    return whole
