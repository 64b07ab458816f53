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
_LEAST_DECIBELS = 33.0
"""Weights that are rounded more coarsely than that (signal to noise) to fit in fours are left to fit in twos."""
_FACTORS = {2: (1.0, 1.2, 1.5, 2.0), 4: (1.2, 1.5, 1.8, 2.2, 2.7, 3.3, 4.0)}
"""Scales that are tried, over the finest, which leaves the largest weight at 127."""
_SAMPLE = 128  # groups of a filter, enough to choose its scale by
_ELEMENTS_AT_ONCE = 1 << 18  # what a pass makes of them stays in the cache


def in_order(data: torch.Tensor, depthwise: bool) -> torch.Tensor:
    """Weights [filters, channels, ...] as [filters, k] in the order of the kernels: channels innermost; where there is
    a filter for each channel, columns of the kernel, each filled up with zeros to a multiple of 4.
    """
    if depthwise:
        columns = data[:, 0].transpose(1, 2)
        return torch.nn.functional.pad(columns, (0, -columns.shape[2] % 4)).flatten(1)
    return (data.movedim(1, -1) if data.dim() > 2 else data).flatten(1)


def _as_before(rows: torch.Tensor, shape: torch.Size, depthwise: bool) -> torch.Tensor:
    """The inverse of `in_order`."""
    if depthwise:
        return rows.view(shape[0], shape[3], -1)[:, :, : shape[2]].transpose(1, 2).unsqueeze(1).contiguous()
    if len(shape) > 2:
        return rows.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()
    return rows.contiguous()


def _together(rows: torch.Tensor, count: int) -> torch.Tensor:
    """[filters, k] as [count, filters, groups]: 2 neighbours, or in two steps of four (2 i, 2 i + 1) of both."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8)).view(len(rows), -1, 2, 2, 2)
    order = (2, 4, 0, 1, 3) if count == 4 else (4, 0, 1, 2, 3)
    return padded.permute(order).reshape(count, len(rows), -1)


def _apart(groups: torch.Tensor, depth: int) -> torch.Tensor:
    """The inverse of `_together`."""
    count, filters, _ = groups.shape
    if count == 4:
        return groups.view(2, 2, filters, -1, 2).permute(2, 3, 0, 4, 1).reshape(filters, -1)[:, :depth]
    return groups.permute(1, 2, 0).reshape(filters, -1)[:, :depth]


def fitting(data: torch.Tensor, *, depthwise: bool = False) -> int:
    """How many products of these int8 weights with bytes fit 16 bits together: 4, 2 or 1."""
    rows = in_order(data, depthwise)
    return next((count for count in (4, 2) if _fits(rows, count)), 1)


def _fits(rows: torch.Tensor, count: int) -> bool:
    for part in torch.split(rows, max(1, _ELEMENTS_AT_ONCE // rows.shape[1])):
        groups = _together(part.to(torch.int16), count)
        positive = groups.clamp(min=0).sum(0, dtype=torch.int16)
        negative = groups.sum(0, dtype=torch.int16) - positive
        if int(positive.max()) > LARGEST_SUM or int(negative.min()) < -LARGEST_SUM:
            return False
    return True


def rounded(data: torch.Tensor, *, depthwise: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 weights like the float32 `data` [filters, ...] and each filter's scale: they fit in fours, or in twos."""
    rows = in_order(data, depthwise)
    signal = float((rows.double() ** 2).sum())
    size = max(1, _ELEMENTS_AT_ONCE // rows.shape[1])
    for count in (2,) if depthwise else (4, 2):
        found = [_nearest(part, count) for part in torch.split(rows, size)]
        noise = sum(error for _, _, error in found)
        if count == 2 or noise * 10 ** (_LEAST_DECIBELS / 10) <= signal:
            break
    stored = torch.cat([item[0] for item in found])
    return _as_before(stored, data.shape, depthwise), torch.cat([item[1] for item in found])


def _nearest(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Integers, each filter's scale, and the sum of squares by which the weights moved."""
    groups = _together(rows, count)
    scales = _scales(groups[:, :, :: max(1, groups.shape[2] // _SAMPLE)], rows.abs().amax(1), _FACTORS[count])
    exact = groups / scales[:, None]
    whole = exact.round()
    for sign in (1, -1):
        over = (whole * sign).clamp_(min=0).sum(0) > LARGEST_SUM
        if over.any():
            own = whole[:, over]
            held = _within((exact[:, over] * sign).T)
            whole[:, over] = torch.where(own * sign > 0, held.T * sign, own)
    error = float(((whole - exact).square_().sum((0, 2)) * scales**2).sum())
    return _apart(whole.to(torch.int8), rows.shape[1]), scales, error


def _scales(groups: torch.Tensor, largest: torch.Tensor, factors: tuple[float, ...]) -> torch.Tensor:
    """Each filter's scale: one that moves its weights little, which may mean to cut groups with large sums."""
    finest = torch.where(largest > 0, largest, torch.ones_like(largest)) / 127
    chosen, least = finest, torch.full_like(finest, float("inf"))
    for factor in factors:
        scales = finest * factor
        exact = groups / scales[:, None]
        error = (exact.round() - exact).square_().sum((0, 2))
        positive = exact.clamp(min=0).sum(0)
        over = torch.maximum(positive, positive - exact.sum(0)) - LARGEST_SUM
        error = (error + over.clamp_(min=0).square_().sum(1) / 2) * scales**2  # shared by two, as a rule
        better = error < least
        least, chosen = torch.where(better, error, least), torch.where(better, scales, chosen)
    return chosen


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
