"""The report as text: passes, layers with what they compute and the candidates tried, precision, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trine.core.sizes import format_bytes


def text(facts: Mapping[str, Any]) -> str:
    """Of what `Plan.inspect()` gives."""
    lines = [line for item in facts["passes"] if (line := pass_line(item))]
    lines += ["", *_layers(facts["layers"]), "", *(f"{name}: {value}" for name, value in summary(facts).items())]
    return "\n".join(lines)


def pass_line(item: Mapping[str, Any]) -> str:
    """What a pass added and removed; "" where it changed nothing."""
    parts = [f"-{count} {op}" for op, count in sorted(item["removed"].items())]
    parts += [f"+{count} {op}" for op, count in sorted(item["added"].items())]
    return f"pass {item['name']}: {', '.join(parts)}" if parts else ""


def summary(facts: Mapping[str, Any]) -> dict[str, str]:
    """The figures of the whole plan, in words."""
    found = {"layers": f"{len(facts['layers'])}, from {_count_origins(facts['layers'])} nodes of the model"}
    if gpu := facts.get("gpu"):
        captured = sum(point["captured"] for point in gpu["points"])
        found["device"] = f"{gpu['name']}; captured for {captured} of {len(gpu['points'])} sets of shapes"
    found["precision"] = precision(facts["layers"])
    found |= _accuracy(facts["precision"])
    tactics = Counter(layer["tactic"] for layer in facts["layers"])
    found["tactics"] = ", ".join(f"{count} {name}" for name, count in tactics.most_common())
    for number, profile in enumerate(facts["profiles"]):
        found[f"profile {number}"] = "; ".join(f"{name} {_bounds(item)}" for name, item in profile.items())
    if facts["memory"]:
        peak, total = facts["memory"]["peak"], facts["memory"]["total"]
        found["intermediates"] = f"{format_bytes(peak)} at once, of {format_bytes(total)} in all"
    found["weights"] = format_bytes(facts["weights"])
    return found


def _accuracy(report: Mapping[str, Any]) -> dict[str, str]:
    """What the precision asked for costs against fp32, where it was measured."""
    found = {
        f"output {name} against fp32": f"cosine {error['cosine']:.5f}, largest error {error['largest']:.3g}, "
        f"same top-1 {error['agreement']:.1%}, over {report['samples']} samples"
        for name, error in report["outputs"].items()
    }
    if report["accuracy"] is not None:
        found["accuracy"] = f"{report['accuracy'][1]:.2f} % ({report['accuracy'][0]:.2f} % in fp32)"
    if report["kept"]:
        found["kept in fp32"] = ", ".join(report["kept"])
    return found


def precision(layers: Sequence[Mapping[str, Any]]) -> str:
    """How many layers give which type."""
    kinds = Counter(str(layer["outputs"][0]["dtype"]) for layer in layers if layer["outputs"])
    return ", ".join(f"{count} in {kind}" for kind, count in kinds.most_common()) or "no layers"


def _count_origins(layers: Sequence[Mapping[str, Any]]) -> int:
    return len({origin for layer in layers for origin in layer["origins"]})


def _bounds(item: Mapping[str, Any]) -> str:
    shapes = ["x".join(map(str, item[key])) for key in ("min", "opt", "max") if item[key] is not None]
    return f"tuned for {shapes[0]}" if len(shapes) == 1 else f"{shapes[0]} to {shapes[2]}, tuned for {shapes[1]}"


def _layers(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for layer in layers:
        shapes = ", ".join(described(value) for value in layer["outputs"])
        lines.append(f"{layer['op']} {layer['name']}: {shapes}; {layer['tactic']}{tried(layer['times_ms'])}")
        if len(layer["origins"]) > 1:
            lines.append(f"    computes {', '.join(layer['origins'])}")
    return lines


def described(value: Mapping[str, Any]) -> str:
    """float32[n,3,8,8]."""
    shape = "?" if value["shape"] is None else ",".join(map(str, value["shape"]))
    return f"{value['dtype']}[{shape}]"


def tried(times: Mapping[str, float]) -> str:
    """The candidates' times, the best first."""
    best = sorted(times.items(), key=lambda item: item[1])
    return f" ({', '.join(f'{name} {ms:.3g} ms' for name, ms in best)})" if best else ""
