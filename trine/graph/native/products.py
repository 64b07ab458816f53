"""Products of computed matrices, and attention."""

from __future__ import annotations

from trine.graph.dtypes import DType
from trine.graph.ir import Node
from trine.graph.native.args import MATMUL_DIMS, GraphAttentionArgs, MatmulArgs
from trine.graph.native.recorder import Recorder, native
from trine.graph.native.tensor import Tensor, collapse


def product(tape: Recorder, a: Tensor, b: Tensor, y: Tensor) -> bool:
    """A step for y [..., m, n] = a [..., m, k] b [..., k, n]; y is contiguous. False for too many dimensions."""
    lead = y.shape[:-2]
    a, b = a.expand((*lead, *a.shape[-2:])), b.expand((*lead, *b.shape[-2:]))
    if a.strides[-1] != 1 and a.shape[-1] != 1:
        a = tape.rows(a)
    shape, (left, right) = collapse(lead, [a.strides[:-2], b.strides[:-2]]) if lead else ([1], ([0], [0]))
    if len(shape) > MATMUL_DIMS:
        return False
    (m, k), n = a.shape[-2:], b.shape[-1]
    args = MatmulArgs(m=m, n=n, k=k, a_row=a.strides[-2], b_row=b.strides[-2], b_column=b.strides[-1])
    missing = MATMUL_DIMS - len(shape)
    args.shape[:] = [1] * missing + list(shape)
    args.a_strides[:], args.b_strides[:] = [0] * missing + list(left), [0] * missing + list(right)
    tape.step("matmul", args, {"a": a, "b": b, "y": y})
    return True


@native("MatMul")
def matmul(tape: Recorder, node: Node) -> bool:
    a, b = (tape.float_tensor(value) for value in node.inputs)
    if a is None or b is None or not a.count or not b.count or not a.shape or not b.shape:
        return False
    y = tape.output(node.output)
    if len(a.shape) == 1:
        a, y = _with_one(a, 0), _with_one(y, len(y.shape) - (len(b.shape) > 1))
    if len(b.shape) == 1:
        b, y = _with_one(b, 1), _with_one(y, len(y.shape))
    return product(tape, a, b, y)


def _with_one(x: Tensor, axis: int) -> Tensor:
    shape = (*x.shape[:axis], 1, *x.shape[axis:])
    found = x.view(shape)
    assert found is not None
    return found


@native("Gemm")
def gemm(tape: Recorder, node: Node) -> bool:
    """Without C and factors; a constant matrix makes it a Linear before."""
    a, b = (tape.float_tensor(value) for value in node.inputs[:2])
    if a is None or b is None or not a.count or not b.count or node.input(2) is not None:
        return False
    if node.attributes.get("alpha", 1.0) != 1:
        return False
    a = a.permute((1, 0)) if node.attributes.get("transA", 0) else a
    b = b.permute((1, 0)) if node.attributes.get("transB", 0) else b
    return product(tape, a, b, tape.output(node.output))


@native("ScaledDotProductAttention")
def attention(tape: Recorder, node: Node) -> bool:
    """softmax(q kᵀ scale + mask) v; the result lies as [batch, queries, heads, size], as what follows wants it."""
    q, k, v = (tape.real_tensor(value) for value in node.inputs[:3])
    mask = tape.float_tensor(node.input(3))
    if q is None or k is None or v is None or (node.input(3) is not None and mask is None):
        return False
    if any(len(x.shape) != 4 or not x.count or x.dtype is not q.dtype for x in (q, k, v)):
        return False
    if node.attributes.get("k_transposed", 0):
        k = k.permute((0, 1, 3, 2))
    batch, heads, queries, size = q.shape
    keys, v_size = v.shape[-2:]
    if k.shape != (batch, heads, keys, size) or v.shape[:2] != (batch, heads):
        return False
    q = q if q.strides[3] == 1 or size == 1 else tape.rows(q)
    args = GraphAttentionArgs(
        batch=batch,
        heads=heads,
        queries=queries,
        keys=keys,
        size=size,
        v_size=v_size,
        scale=node.attributes["scale"],
        guarded=node.attributes.get("guarded", 0),
    )
    y = tape.output(node.output, order=(0, 2, 1, 3))
    if mask is not None:
        scores = (batch, heads, queries, keys)
        if len(mask.shape) > 4 or any(a not in (1, b) for a, b in zip(mask.shape[::-1], scores[::-1], strict=False)):
            return False
        mask = mask.expand(scores)
        if mask.strides[3] not in (0, 1):
            mask = tape.rows(mask)
        args.mask_strides[:] = mask.strides
    args.q_strides[:], args.k_strides[:], args.v_strides[:] = q.strides, k.strides, v.strides
    args.y_strides[:], args.y_dtype = y.strides, y.number
    kernel = "graph_attention" if q.dtype is DType.FLOAT32 else "bf16_attention"
    if kernel == "graph_attention" and y.dtype is not DType.FLOAT32:
        return False
    tape.step(kernel, args, {"q": q, "k": k, "v": v, "mask": mask, "y": y})
    return True
