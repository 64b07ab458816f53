"""Places for the boxes of a directed graph, in rows from top to bottom (after Sugiyama, Tagawa and Toda, 1981).

A box stands in the row after the last that it depends on; an edge over several rows gets an invisible box in each, so
that it bends around others. Rows are ordered by where the neighbours stand, then each box moves as near to the middle
of its neighbours as the order allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

_SWEEPS = 8
_LONGEST = 12
"""Rows an edge may pass: a longer one is not drawn, but named at its end."""
ROW = 92.0
GAP = 26.0
_INVISIBLE = 10.0
"""Width of an edge that passes through a row."""


@dataclass(frozen=True)
class Layout:
    """Centres of boxes, points of the edges that are drawn, and the whole picture's size."""

    places: list[tuple[float, float]]
    edges: dict[tuple[int, int], list[tuple[float, float]]]
    width: float
    height: float


def arrange(widths: Sequence[float], edges: Sequence[tuple[int, int]]) -> Layout:
    """Boxes 0 … n-1 of these widths, where each edge leads from a box to a later one."""
    rows_of = _rows(len(widths), edges)
    drawn = [edge for edge in dict.fromkeys(edges) if rows_of[edge[1]] - rows_of[edge[0]] <= _LONGEST]
    sizes, levels, links, chains = list(widths), list(rows_of), [], {}
    for start, end in drawn:
        chain = [start]
        for level in range(rows_of[start] + 1, rows_of[end]):
            chain.append(len(sizes))
            sizes.append(_INVISIBLE)
            levels.append(level)
        chain.append(end)
        links += list(pairwise(chain))
        chains[start, end] = chain
    rows: list[list[int]] = [[] for _ in range(max(levels, default=-1) + 1)]
    for box, level in enumerate(levels):
        rows[level].append(box)
    above, below = _neighbours(len(sizes), links)
    _order(rows, above, below)
    x = _align(rows, sizes, above, below)
    left = min((x[box] - sizes[box] / 2 for box in range(len(sizes))), default=0.0)
    places = [(x[box] - left + GAP, (levels[box] + 0.5) * ROW) for box in range(len(sizes))]
    points = {edge: [places[box] for box in chain] for edge, chain in chains.items()}
    width = max((places[box][0] + sizes[box] / 2 for box in range(len(sizes))), default=0.0) + GAP
    return Layout(places[: len(widths)], points, width, len(rows) * ROW)


def _rows(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """Each box's row; one that depends on nothing stands right above the first that needs it."""
    row = [0] * count
    after: list[list[int]] = [[] for _ in range(count)]
    before = [0] * count
    for start, end in edges:
        after[start].append(end)
        before[end] += 1
    for box in range(count):
        for end in after[box]:
            row[end] = max(row[end], row[box] + 1)
    for box in range(count):
        if not before[box] and after[box]:
            row[box] = min(row[end] for end in after[box]) - 1
    return row


def _neighbours(count: int, links: Sequence[tuple[int, int]]) -> tuple[list[list[int]], list[list[int]]]:
    above: list[list[int]] = [[] for _ in range(count)]
    below: list[list[int]] = [[] for _ in range(count)]
    for start, end in links:
        below[start].append(end)
        above[end].append(start)
    return above, below


def _order(rows: list[list[int]], above: list[list[int]], below: list[list[int]]) -> None:
    """Sort each row by the mean place of the neighbours above, then below, and again."""
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        place = {box: index for row in rows for index, box in enumerate(row)}
        for row in rows if down else rows[::-1]:
            neighbours = above if down else below
            means = {
                box: sum(place[other] for other in neighbours[box]) / len(neighbours[box])
                if neighbours[box]
                else float(place[box])
                for box in row
            }
            row.sort(key=means.__getitem__)
            place.update({box: index for index, box in enumerate(row)})


def _align(
    rows: list[list[int]], sizes: Sequence[float], above: list[list[int]], below: list[list[int]]
) -> Mapping[int, float]:
    x: dict[int, float] = {}
    for row in rows:
        offset = 0.0
        for box in row:
            x[box] = offset + sizes[box] / 2
            offset += sizes[box] + GAP
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else rows[::-1]:
            wanted = []
            for box in row:
                near = (above if down else below)[box] or (below if down else above)[box]
                wanted.append(sum(x[other] for other in near) / len(near) if near else x[box])
            x.update(zip(row, _spread(wanted, [sizes[box] for box in row]), strict=True))
    return x


def _spread(wanted: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """The places nearest to `wanted` (least squares) that keep the order and the gaps: pools of adjacent violators."""
    offsets = [0.0]
    for left, right in pairwise(sizes):
        offsets.append(offsets[-1] + (left + right) / 2 + GAP)
    pools: list[tuple[float, int]] = []
    for place, offset in zip(wanted, offsets, strict=False):
        total, count = place - offset, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            more, members = pools.pop()
            total, count = total + more, count + members
        pools.append((total, count))
    means = [total / count for total, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=False)]
