"""The optimiser: small functions graph → graph, run in order by `optimise`. docs/graph-passes.md shows how to add one.

A pass changes the graph it is given and returns it; `optimise` works on the caller's graph, checks it after every pass
and tells `explain` what each did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trine.graph.errors import VerificationError
from trine.graph.ir import Graph
from trine.graph.passes.attention import fuse_attention
from trine.graph.passes.batch_norm import fold_batch_norm, lower_batch_norm
from trine.graph.passes.cleanup import merge_common_subexpressions, remove_dead_nodes
from trine.graph.passes.constants import fold_constants
from trine.graph.passes.convolution import fuse_convolution, lift_convolution
from trine.graph.passes.gelu import fuse_gelu, fuse_silu
from trine.graph.passes.hoist import hoist_activations
from trine.graph.passes.integer_operators import spread_integer_operators
from trine.graph.passes.linear import fuse_linear
from trine.graph.passes.merge import merge_linear
from trine.graph.passes.normalization import fuse_layer_norm, fuse_rms_norm
from trine.graph.passes.origins import Snapshot, label, trace_origins
from trine.graph.passes.padding import fold_padding
from trine.graph.passes.quantized import fuse_quantized, link_quantized_weights
from trine.graph.passes.scale import fold_scale
from trine.graph.passes.simplify import simplify
from trine.graph.passes.transposes import cancel_transposes, unfold_transposes
from trine.graph.shapes import infer_shapes

Pass = Callable[[Graph], Graph]

PASSES: tuple[Pass, ...] = (
    infer_shapes,
    fold_constants,
    spread_integer_operators,
    simplify,
    merge_common_subexpressions,
    unfold_transposes,
    cancel_transposes,
    fuse_layer_norm,
    fuse_rms_norm,
    fuse_gelu,
    fuse_silu,
    hoist_activations,
    fold_batch_norm,
    lower_batch_norm,
    fuse_attention,
    link_quantized_weights,
    fold_padding,
    lift_convolution,
    fuse_convolution,
    fuse_linear,
    fold_scale,
    merge_linear,
    fuse_quantized,
    fold_constants,
    simplify,
    merge_common_subexpressions,
    remove_dead_nodes,
    infer_shapes,
)


@dataclass(frozen=True)
class Effect:
    """What a pass did: how many nodes of each operator it added and removed."""

    name: str
    added: dict[str, int]
    removed: dict[str, int]

    def __str__(self) -> str:
        parts = [f"-{count} {op}" for op, count in sorted(self.removed.items())]
        parts += [f"+{count} {op}" for op, count in sorted(self.added.items())]
        return f"{self.name}: {', '.join(parts) or 'no change'}"


def optimise(graph: Graph, passes: Sequence[Pass] = PASSES) -> list[Effect]:
    """Run the passes over `graph`, in place, with the verifier after each."""
    effects = []
    for node in graph.walk():
        node.origins = node.origins or (label(node),)
    for run in passes:
        before = Counter(node.op for node in graph.walk())
        snapshot = Snapshot.of(graph)
        try:
            run(graph)
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise VerificationError(f"pass {run.__name__} can't work on this model: {reason}") from error
        graph.verify()
        trace_origins(snapshot, graph)
        after = Counter(node.op for node in graph.walk())
        effects.append(Effect(run.__name__, dict(after - before), dict(before - after)))
    return effects
