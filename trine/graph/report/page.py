"""The report as a page that needs nothing from elsewhere: figures, a picture of the graph, a table to search."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import pairwise
from typing import Any

from trine.graph.report.layout import Layout, arrange
from trine.graph.report.text import described, pass_line, summary, tried

_BOX = 46.0
_LETTER = 7.0
_FAMILIES = {
    "product": ("Linear", "MatMul", "Gemm", "Conv", "FusedConv", "ConvTranspose", "Einsum"),
    "attention": ("ScaledDotProductAttention", "Attention", "HeadsAttention", "RotaryEmbedding"),
    "norm": ("Normalization", "Softmax", "LRN"),
    "move": ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Split", "Slice", "Concat", "Gather", "Expand"),
    "pool": ("Pool", "Reduce", "Resize"),
}


def page(facts: Mapping[str, Any], title: str) -> str:
    """Of what `Plan.inspect()` gives."""
    boxes = _boxes(facts)
    parts = {
        "title": html.escape(title),
        "summary": "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in summary(facts).items()),
        "passes": "".join(f"<li>{html.escape(line[5:])}</li>" for line in map(pass_line, facts["passes"]) if line),
        "graph": _picture(boxes),
        "rows": "".join(_row(index, layer) for index, layer in enumerate(facts["layers"])),
    }
    template = resources.files("trine.graph.report").joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


class _Box:
    """One of the picture: an input, a layer or an output; `layer` is its row in the table."""

    def __init__(self, title: str, lines: Sequence[str], family: str, layer: int | None, reads: Sequence[str]) -> None:
        self.title = title
        self.lines = [line if len(line) <= 40 else f"{line[:18]}…{line[-21:]}" for line in (title, *lines)]
        self.family = family
        self.layer = layer
        self.reads = reads
        self.width = max(map(len, self.lines)) * _LETTER + 16


def _boxes(facts: Mapping[str, Any]) -> list[tuple[_Box, list[str]]]:
    """Boxes with the names of the values that they make."""
    boxes = [(_Box(value["name"], [described(value)], "input", None, ()), [value["name"]]) for value in facts["inputs"]]
    for index, layer in enumerate(facts["layers"]):
        best = f" {min(layer['times_ms'].values()):.3f} ms" if layer["times_ms"] else ""
        shape = described(layer["outputs"][0]) if layer["outputs"] else ""
        lines = [shape, f"{layer['tactic']}{best}"]
        box = _Box(layer["op"], lines, _family(layer["op"]), index, layer["inputs"])
        boxes.append((box, [value["name"] for value in layer["outputs"]]))
    for value, read in zip(facts["outputs"], facts["returns"], strict=True):
        boxes.append((_Box(value["name"], [described(value)], "output", None, [read]), []))
    return boxes


def _family(op: str) -> str:
    return next((family for family, names in _FAMILIES.items() if any(name in op for name in names)), "other")


def _picture(boxes: Sequence[tuple[_Box, list[str]]]) -> str:
    makers = {name: index for index, (_, made) in enumerate(boxes) for name in made}
    edges = [(makers[name], index) for index, (box, _) in enumerate(boxes) for name in box.reads if name in makers]
    layout = arrange([box.width for box, _ in boxes], edges)
    shapes = [_edge(layout, edge) for edge in layout.edges]
    from_afar: dict[int, list[str]] = {}
    for start, end in dict.fromkeys(edges):
        if (start, end) not in layout.edges:
            from_afar.setdefault(end, []).append(boxes[start][0].title)
    for index, (box, _) in enumerate(boxes):
        shapes.append(_shape(box, layout.places[index], from_afar.get(index, [])))
    width, height = round(layout.width), round(layout.height)
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg id="graph" xmlns="http://www.w3.org/2000/svg" {size} role="img">{"".join(shapes)}</svg>'


def _edge(layout: Layout, edge: tuple[int, int]) -> str:
    """Straight down beside the boxes of a row, and bent between rows."""
    half = _BOX / 2 + 3
    points = layout.edges[edge]
    path = f"M{points[0][0]:.1f} {points[0][1] + half:.1f}"
    for (x0, y0), (x1, y1) in pairwise(points):
        middle = (y0 + y1) / 2
        path += f"V{y0 + half:.1f}C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1 - half:.1f}"
    return f'<path class="edge" d="{path}"/>'


def _shape(box: _Box, place: tuple[float, float], from_afar: Sequence[str]) -> str:
    x, y = place
    texts = "".join(
        f'<text x="{x:.1f}" y="{y - 12 + 14 * number:.1f}">{html.escape(line)}</text>'
        for number, line in enumerate(box.lines)
        if line
    )
    above = f"also reads {', '.join(from_afar)}"
    note = f'<text class="afar" x="{x:.1f}" y="{y - 32:.1f}">{html.escape(above)}</text>' if from_afar else ""
    link = "" if box.layer is None else f' data-layer="{box.layer}"'
    left, top = x - box.width / 2, y - _BOX / 2 - 3
    frame = f'x="{left:.1f}" y="{top:.1f}" width="{box.width:.1f}" height="{_BOX + 6:.0f}" rx="6"'
    return f'<g class="box {box.family}"{link}><rect {frame}/>{texts}{note}</g>'


def _row(index: int, layer: Mapping[str, Any]) -> str:
    cells = [
        str(index),
        layer["op"],
        layer["name"],
        ", ".join(described(value) for value in layer["outputs"]),
        layer["tactic"],
        f"{min(layer['times_ms'].values()):.4f}" if layer["times_ms"] else "",
        tried(layer["times_ms"])[2:-1],
        ", ".join(layer["origins"]),
    ]
    return f'<tr id="layer-{index}">{"".join(f"<td>{html.escape(cell)}</td>" for cell in cells)}</tr>'
