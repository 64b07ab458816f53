"""From the optimised graph of any shapes to one of static shapes, with what a GPU runs as one kernel as one node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trine.graph.errors import InputError
from trine.graph.gpu import operators  # noqa: F401 (fills the table of operators)
from trine.graph.gpu.spread import join_spread
from trine.graph.ir import Graph, Node, Value, constant
from trine.graph.passes.cleanup import merge_common_subexpressions, remove_dead_nodes
from trine.graph.passes.constants import fold_constants
from trine.graph.passes.origins import Snapshot, trace_origins
from trine.graph.passes.pattern import remove_unread, replace_node
from trine.graph.passes.simplify import simplify
from trine.graph.shapes import infer_shapes

Shapes = Mapping[str, Sequence[int]]


def lower(graph: Graph, shapes: Shapes) -> Graph:
    """A new graph for inputs of these shapes; constants are shared with `graph`, which stays as it is."""
    lowered = clone(graph)
    for value in lowered.inputs:
        if value.name in shapes:
            value.shape = tuple(shapes[value.name])
    for run in _PASSES:
        before = Snapshot.of(lowered)
        run(lowered)
        trace_origins(before, lowered)
    lowered.verify()
    return lowered


def clone(graph: Graph, made: dict[Value, Value] | None = None) -> Graph:
    """Values and nodes anew, constants shared. Shapes of what is computed are forgotten where they are not static."""
    made = {} if made is None else made

    def value(old: Value | None) -> Value | None:
        if old is None or old.is_constant:
            return old
        if old not in made:
            made[old] = Value(old.name, old.dtype, old.static_shape)
        return made[old]

    copy = Graph(graph.name, output_names=list(graph.output_names))
    copy.inputs = [item for item in map(value, graph.inputs) if item is not None]
    for node in graph.nodes:
        attributes = {
            key: clone(item, made) if isinstance(item, Graph) else item for key, item in node.attributes.items()
        }
        outputs = [item for item in map(value, node.outputs) if item is not None]
        inputs = [value(item) for item in node.inputs]
        copy.nodes.append(Node(node.op, inputs, outputs, attributes, node.name, node.origins))
    copy.outputs = [item for item in map(value, graph.outputs) if item is not None]
    return copy


def input_shapes(graph: Graph, given: Shapes) -> dict[str, tuple[int, ...]]:
    """Each input's shape: its own where it is static, else the one given; InputError for one that stays open."""
    shapes = {}
    for value in graph.inputs:
        shape = given.get(value.name, value.static_shape)
        if shape is None:
            raise InputError(
                f"input {value.name!r} has open dimensions: name its shape (--opt {value.name}:1x…)", param=value.name
            )
        shapes[value.name] = tuple(shape)
    return shapes


def narrow_masks(graph: Graph) -> Graph:
    """A mask of zeros is none. One that is a condition and-ed with a constant that is true everywhere is the condition.

    Exporters widen a row of padding flags to [B, 1, S, S] that way; attention spreads the row itself.
    """
    users = graph.users()
    for attention in graph.nodes:
        mask = attention.input(3)
        if attention.op == "ScaledDotProductAttention" and mask is not None and mask.is_constant:
            if not mask.data.any():
                attention.inputs = attention.inputs[:3]
            continue
        where = None if mask is None else mask.producer
        if attention.op != "ScaledDotProductAttention" or where is None or where.op != "Where":
            continue
        both = None if where.inputs[0] is None else where.inputs[0].producer
        only_masks = all(node.op == "ScaledDotProductAttention" for node in users[where.output])
        if both is None or both.op != "And" or not only_masks or where.output in graph.outputs:
            continue
        for kept, other in (both.inputs, both.inputs[::-1]):
            if kept is not None and other is not None and other.is_constant and bool(other.data.all()):
                choices = [value for value in where.inputs[1:] if value is not None and value.is_constant]
                if len(choices) == 2 and all(value.data.numel() == 1 for value in choices):
                    where.inputs[0] = kept
                    where.output.shape = kept.shape
                    break
    remove_unread(graph)
    return graph


def _made_by(value: Value | None, op: str, perm: list[int] | None = None) -> Node | None:
    node = None if value is None else value.producer
    if node is None or node.op != op or (perm is not None and node.attributes.get("perm") != perm):
        return None
    return node


def _rows_of_heads(value: Value | None, perm: list[int]) -> tuple[Value, int] | None:
    """x [B, S, H D] of which `value` is Transpose(Reshape(x, [B, S, H, D]), perm), and H."""
    turned = _made_by(value, "Transpose", perm)
    split = None if turned is None else _made_by(turned.inputs[0], "Reshape")
    if split is None or split.inputs[0] is None:
        return None
    x, shape = split.inputs[0].static_shape, split.output.static_shape
    if x is None or shape is None or len(x) != 3 or len(shape) != 4 or x[:2] != shape[:2]:
        return None
    return split.inputs[0], shape[2]


def fuse_heads(graph: Graph) -> Graph:
    """Attention with the reshapes and transposes around it, which split rows into heads and join them again."""
    for attention in list(graph.nodes):
        if attention.op != "ScaledDotProductAttention":
            continue
        turned = bool(attention.attributes.get("k_transposed", 0))
        perms = ([0, 2, 1, 3], [0, 2, 3, 1] if turned else [0, 2, 1, 3], [0, 2, 1, 3])
        found = [_rows_of_heads(value, perm) for value, perm in zip(attention.inputs[:3], perms, strict=True)]
        users = graph.users()
        back = users.get(attention.output, [])
        join = users.get(back[0].output, []) if len(back) == 1 and back[0].op == "Transpose" else []
        if any(item is None for item in found) or len(join) != 1 or attention.output in graph.outputs:
            continue
        rows = [item for item in found if item is not None]
        flat = back[0].attributes.get("perm") == [0, 2, 1, 3] and join[0].op in ("Reshape", "Flatten")
        (q, heads), *rest = rows
        if not flat or any(count != heads for _, count in rest) or join[0].output.shape != q.shape:
            continue
        if (
            back[0].output in graph.outputs
            or len({value.static_shape[-1] for value, _ in rows if value.static_shape}) > 1
        ):
            continue
        attributes = {"heads": heads, "scale": attention.attributes["scale"]}
        if attention.attributes.get("guarded"):
            attributes["guarded"] = 1
        inputs = [*(value for value, _ in rows), attention.input(3)]
        replace_node(graph, join[0], Node("HeadsAttention", inputs, [], attributes, attention.name))
    remove_unread(graph)
    return graph


def add_constants_once(graph: Graph) -> Graph:
    """(x + a) + b of constants is x + (a + b)."""
    users = graph.users()
    for node in list(graph.nodes):
        for inner, b in (node.inputs, node.inputs[::-1]) if node.op == "Add" else ():
            first = _made_by(inner, "Add")
            if first is None or b is None or not b.is_constant or inner is None or len(users[inner]) != 1:
                continue
            for x, a in (first.inputs, first.inputs[::-1]):
                if a is not None and a.is_constant and x is not None and inner not in graph.outputs:
                    total = constant(f"{node.output.name}.constant", a.data + b.data)
                    replace_node(graph, node, Node("Add", [x, total], [], {}, node.name))
                    users = graph.users()
                    break
            break
    remove_unread(graph)
    return graph


def fuse_add_norm(graph: Graph) -> Graph:
    """A layer norm takes the sum before it, and gives it to those who read it, too; a product leaves its sum to it."""
    for node in list(graph.nodes):
        x, scale, bias = node.input(0), node.input(1), node.input(2)
        if node.op != "LayerNormalization" or x is None or scale is None or x.shape is None:
            continue
        last = node.attributes.get("axis", -1) % len(x.shape) == len(x.shape) - 1
        vectors = all(value is None or value.shape == x.shape[-1:] for value in (scale, bias))
        if not last or not vectors or any(value.name for value in node.outputs[1:]):
            continue
        left, right = _split_sum(graph, x)
        outputs = [node.output, Value("") if right is None else x, Value("")]
        attributes = {"epsilon": node.attributes.get("epsilon", 1e-5)}
        fused = Node("AddLayerNorm", [left, right, scale, bias], outputs, attributes, node.name)
        graph.nodes[graph.nodes.index(node)] = fused
    in_order(graph)
    return graph


def _split_sum(graph: Graph, x: Value) -> tuple[Value, Value | None]:
    """The two values whose sum is x, which nothing computes any more; or x and None where it must stay."""
    node = x.producer
    if node is None:
        return x, None
    if node.op == "Add":
        a, b = node.inputs
        if a is not None and b is not None and a.shape == b.shape == x.shape and not (a.is_constant or b.is_constant):
            graph.nodes.remove(node)
            return a, b
    if node.op == "Linear" and node.input(3) is not None and not node.attributes["activation"]:
        alone, residual = Value(f"{x.name}.product", x.dtype, x.shape, producer=node), node.inputs[3]
        node.outputs, node.inputs = [alone], node.inputs[:3]
        return alone, residual
    return x, None


def in_order(graph: Graph) -> None:
    """Sort the nodes so that each stands after those whose results it reads; the order is kept where it may be."""
    waiting, defined = list(graph.nodes), set(graph.inputs)
    ordered: list[Node] = []
    made = {value for node in graph.nodes for value in node.outputs}
    while waiting:
        later = []
        for node in waiting:
            if all(value in defined or value not in made for value in node.reads()):
                ordered.append(node)
                defined.update(node.outputs)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise AssertionError("the graph has a cycle")
        waiting = later
    graph.nodes[:] = ordered


_PASSES = (
    infer_shapes, fold_constants, simplify, merge_common_subexpressions, remove_dead_nodes, infer_shapes,
    narrow_masks, fuse_heads, add_constants_once, fuse_add_norm, join_spread, remove_dead_nodes,
)  # fmt: skip
