"""Native tapes: steps, memory, threads."""

from __future__ import annotations

import threading

import torch

from tests.graph.native_check import GraphMaker, isa, needs_native
from trine.graph.native.tape import Arenas

__all__ = ["isa"]
pytestmark = needs_native


def mlp(batch: int, seed: int = 0) -> GraphMaker:
    g = GraphMaker()
    generator = torch.Generator().manual_seed(seed)
    x = g.input(torch.randn(batch, 37, generator=generator))
    for n, k, activation in ((64, 37, "relu"), (50, 64, "gelu"), (10, 50, "")):
        weight, bias = torch.randn(n, k, generator=generator) * 0.2, torch.randn(n, generator=generator)
        x = g.node("Linear", x, weight, bias, activation=activation)
    g.graph.outputs = [x]
    return g


def test_a_network_of_three_layers_is_one_call(isa: str) -> None:
    for batch in (1, 3, 16):
        g = mlp(batch)
        program = g.check(g.graph.outputs[0])
        assert len(program.tape.steps) == 3


def test_memory_is_shared_by_values_that_never_meet() -> None:
    g = GraphMaker()
    x = g.input(torch.randn(64, 64))
    for _ in range(8):
        x = g.node("Transpose", g.node("Relu", x), perm=[1, 0])
    program = g.check(x)
    assert program.arena_bytes <= 2 * 64 * 64 * 4


def test_several_threads_run_one_program() -> None:
    g = mlp(8)
    program = g.check(g.graph.outputs[0])
    expected = program.run(*g.arguments)[0]
    wrong: list[int] = []

    def work() -> None:
        for _ in range(50):
            if not torch.equal(program.run(*g.arguments)[0], expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_python_computes_stands_between_steps() -> None:
    g = GraphMaker()
    x = g.input(torch.randn(4, 6))
    y = g.node("CumSum", g.node("Relu", x), torch.tensor(1))
    z = g.node("Add", g.node("Sigmoid", y), g.node("CumSum", g.input(torch.randn(4, 1)), torch.tensor(0)))
    program = g.check([z, y], native=False)
    assert [node.op for node in program.python_nodes] == ["CumSum", "CumSum"]


def test_arenas_serve_programs_of_all_sizes() -> None:
    arenas = Arenas()
    small, large = arenas.take(1000), arenas.take(5000)
    arenas.give(small)
    arenas.give(large)
    assert arenas.take(2000) is large
    assert arenas.take(900) is small
    arenas.give(small)
    assert arenas.take(4000).nbytes == 4000  # in the place of the small one
    assert arenas.take(10).nbytes == 10
