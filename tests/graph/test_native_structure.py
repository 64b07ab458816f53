"""Views, copies, gathers against the operators' meaning."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.graph.native_check import GraphMaker, isa, needs_native
from trine.graph.errors import ExecutionError

__all__ = ["isa"]
pytestmark = needs_native


def test_transposes(isa: str) -> None:
    for shape in ((3, 4, 5), (2, 17, 33), (8, 1, 16), (2, 3, 4, 5)):
        for dtype in (torch.float32, torch.int64, torch.bool):
            for perm in itertools.permutations(range(len(shape))):
                g = GraphMaker()
                x = torch.randn(shape).to(dtype)
                g.check(g.node("Transpose", g.input(x), perm=list(perm)))


def test_large_transposes(isa: str) -> None:
    for perm in ((0, 2, 1), (2, 1, 0), (1, 0, 2), (2, 0, 1)):
        g = GraphMaker()
        g.check(g.node("Transpose", g.input(torch.randn(31, 130, 67)), perm=list(perm)))


def test_reshapes_of_views_copy_where_they_must() -> None:
    g = GraphMaker()
    x = g.input(torch.randn(2, 3, 4, 5))
    turned = g.node("Transpose", x, perm=[0, 2, 1, 3])
    a = g.node("Reshape", turned, torch.tensor([2, 4, 15]))
    b = g.node("Reshape", g.node("Transpose", x, perm=[1, 0, 2, 3]), torch.tensor([3, 2, 20]))
    c = g.node("Flatten", g.node("Unsqueeze", g.node("Squeeze", x), torch.tensor([1])), axis=2)
    g.check([a, b, c])


def test_slices_and_splits(isa: str) -> None:
    g = GraphMaker()
    x = g.input(torch.randn(6, 7, 8))
    backwards = g.node("Slice", x, *(torch.tensor(v) for v in ([-1, 1], [-100, 6], [0, 2], [-2, 3])))
    parts = g.node("Split", x, torch.tensor([2, 5]), outputs=2, axis=1)
    shifted = g.node("Add", backwards, torch.tensor(1.0))
    total = g.node("Softmax", parts[1], axis=2)
    picked = g.node("Gather", x, torch.tensor(-2), axis=1)
    g.check([backwards, parts[0], shifted, total, picked, g.node("MatMul", picked, g.input(torch.randn(8, 3)))])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gather(axis: int, isa: str) -> None:
    for dtype in (torch.int64, torch.int32):
        for data in (torch.randn(5, 6, 7), torch.randint(0, 9, (5, 6, 7))):
            g = GraphMaker()
            indices = g.input(torch.tensor([[0, -1, 2], [4, 3, -5]], dtype=dtype))
            g.check(g.node("Gather", g.input(data), indices, axis=axis))


def test_a_number_out_of_range_is_an_error_with_the_nodes_name() -> None:
    g = GraphMaker()
    y = g.node("Gather", g.input(torch.randn(5, 6)), g.input(torch.tensor([1, 2])))
    program = g.check(y)
    for index in (5, -6, 1 << 40):
        with pytest.raises(ExecutionError, match="'n1'"):
            program.run(g.arguments[0], torch.tensor([0, index]))


def test_concat_and_tile(isa: str) -> None:
    for axis in (0, 1, -1):
        shapes = [[2, 3, 4] for _ in range(3)]
        for k, size in enumerate((1, 5, 3)):
            shapes[k][axis] = size
        g = GraphMaker()
        whole = g.node("Concat", *(g.input(torch.randn(shape)) for shape in shapes), axis=axis)
        g.check([whole, g.node("Tile", whole, torch.tensor([2, 1, 3]))])


def test_channels_move_between_depth_and_space(isa: str) -> None:
    for mode in ("DCR", "CRD"):
        for last in (False, True):
            g = GraphMaker()
            x = g.input(torch.randn(2, 3, 5, 12) if last else torch.randn(2, 12, 3, 5))
            x = g.node("Transpose", x, perm=[0, 3, 1, 2]) if last else x
            y = g.node("DepthToSpace", x, blocksize=2, mode=mode)
            g.check([y, g.node("SpaceToDepth", y, blocksize=2)])


def test_pad(isa: str) -> None:
    for last in (False, True):
        g = GraphMaker()
        x = g.input(torch.randn(2, 5, 6, 3) if last else torch.randn(2, 3, 5, 6))
        x = g.node("Transpose", x, perm=[0, 3, 1, 2]) if last else x
        around = g.node("Pad", x, torch.tensor([0, 0, 1, 2, 0, 1, 0, 3]), torch.tensor(-1.5))
        cut = g.node("Pad", x, torch.tensor([-1, 1, -2, 4]), None, torch.tensor([2, 3]))
        g.check([around, cut])


def test_many_dimensions(isa: str) -> None:
    g = GraphMaker()
    x = g.input(torch.randn(2, 1, 2, 3, 2, 2, 3, 2, 2, 2))
    turned = g.node("Transpose", x, perm=[9, 7, 5, 3, 1, 8, 6, 4, 2, 0])
    g.check([g.node("Reshape", turned, torch.tensor([-1])), g.node("Add", turned, x)], native=False)


def test_images_are_written_where_a_concatenation_wants_them(isa: str) -> None:
    """Each layer reads all that came before, as in a DenseNet; one of them twice, and pooled."""
    g = GraphMaker()
    plain = {"strides": [1, 1], "dilations": [1, 1], "pads": [1] * 4, "group": 1, "activation": "relu"}
    features = [g.node("FusedConv", g.input(torch.randn(2, 20, 9, 7)), torch.randn(16, 20, 3, 3), None, None, **plain)]
    for _ in range(3):
        whole = g.node("Concat", *features, axis=1)
        weight = torch.randn(8, whole.static_shape[1], 3, 3) / 10
        features.append(g.node("FusedConv", g.node("Sigmoid", whole), weight, None, None, **plain))
    pooled = g.node("MaxPool", features[0], kernel_shape=[3, 3], pads=[1] * 4)
    last = g.node("Concat", *features, pooled, features[1], axis=-3)
    program = g.check(g.node("Sigmoid", last))
    copies = [step.node.op for step in program.tape.steps if step.kernel_name == "copy"]
    assert copies == ["FusedConv", "Concat", "Sigmoid"]  # the input and the output turned; what stands there twice


def test_a_concatenation_that_the_caller_wants(isa: str) -> None:
    """One result, which another concatenation reads, too; a part is a result itself."""
    g = GraphMaker()
    x = g.input(torch.randn(1, 4, 6, 6))
    pools = [g.node("MaxPool", x, kernel_shape=[k, k], pads=[k // 2] * 4) for k in (1, 3, 5)]
    whole = g.node("Concat", *pools[:2], axis=1)
    g.check([g.node("Concat", whole, pools[2], axis=1), whole, pools[2]])
