"""RNN, GRU and LSTM, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trine.graph.operators.registry import operator
from trine.graph.operators.structure import ints

_Activation = Callable[[Tensor], Tensor]
_State = tuple[Tensor, ...]


def _activation(name: str, alpha: float | None, beta: float | None) -> _Activation:
    a = 1.0 if alpha is None else alpha
    b = 0.0 if beta is None else beta
    table: dict[str, _Activation] = {
        "relu": torch.relu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "softsign": torch.nn.functional.softsign,
        "softplus": torch.nn.functional.softplus,
        "affine": lambda x: a * x + b,
        "elu": lambda x: torch.where(x < 0, a * torch.expm1(x), x),
        "leakyrelu": lambda x: torch.nn.functional.leaky_relu(x, 0.01 if alpha is None else alpha),
        "thresholdedrelu": lambda x: torch.where(x > a, x, torch.zeros((), dtype=x.dtype)),
        "scaledtanh": lambda x: a * torch.tanh((1.0 if beta is None else b) * x),
        "hardsigmoid": lambda x: torch.clamp((0.2 if alpha is None else a) * x + (0.5 if beta is None else b), 0, 1),
    }
    if name.lower() not in table:
        raise ValueError(f"no recurrent operator has an activation {name!r}")
    return table[name.lower()]


def _activations(
    names: list[str] | None, default: list[str], alphas: list[float] | None, betas: list[float] | None, count: int
) -> list[list[_Activation]]:
    """For each direction its functions. Alphas and betas are handed out in order to the functions that take them."""
    names = names or default * count
    a, b = iter(alphas or []), iter(betas or [])
    with_alpha = {"affine", "elu", "leakyrelu", "thresholdedrelu", "scaledtanh", "hardsigmoid"}
    with_beta = {"affine", "scaledtanh", "hardsigmoid"}
    built = [
        _activation(
            name,
            next(a, None) if name.lower() in with_alpha else None,
            next(b, None) if name.lower() in with_beta else None,
        )
        for name in names
    ]
    size = len(built) // count
    return [built[i * size : (i + 1) * size] for i in range(count)]


def _run(
    x: Tensor,
    lengths: Tensor | None,
    initial: list[_State],
    steps: list[Callable[[Tensor, _State], _State]],
    reverse_first: bool,
) -> tuple[Tensor, list[_State]]:
    """x [T, B, I] through each direction: outputs [T, D, B, H] and the last states. Past its length a row rests."""
    time, batch = x.shape[:2]
    limits = torch.full((batch,), time) if lengths is None else torch.tensor(ints(lengths))
    outputs, finals = [], []
    for direction, (state, step) in enumerate(zip(initial, steps, strict=True)):
        backwards = reverse_first or direction == 1
        rows: list[Tensor] = [torch.zeros_like(state[0])] * time
        for t in reversed(range(time)) if backwards else range(time):
            active = (limits > t)[:, None]
            new = step(x[t], state)
            state = tuple(torch.where(active, after, before) for after, before in zip(new, state, strict=True))
            rows[t] = torch.where(active, new[0], torch.zeros((), dtype=x.dtype))
        outputs.append(torch.stack(rows) if rows else x.new_zeros(0, *state[0].shape))
        finals.append(state)
    return torch.stack(outputs, 1), finals


def _finish(outputs: Tensor, finals: list[_State], layout: int) -> tuple[Tensor, ...]:
    states = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    if layout:
        return (outputs.permute(2, 0, 1, 3), *(state.transpose(0, 1) for state in states))
    return (outputs, *states)


def _setup(
    x: Tensor, w: Tensor, initial: list[Tensor | None], layout: int, hidden: int
) -> tuple[Tensor, int, list[_State]]:
    directions = w.shape[0]
    if layout:
        x = x.transpose(0, 1)
        initial = [None if state is None else state.transpose(0, 1) for state in initial]
    zero = torch.zeros(directions, x.shape[1], hidden, dtype=x.dtype)
    full = [zero if state is None else state for state in initial]
    return x, directions, [tuple(state[d] for state in full) for d in range(directions)]


def _limit(x: Tensor, clip: float | None) -> Tensor:
    return x if clip is None else x.clamp(-clip, clip)


@operator("RNN")
def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: list[float] | None = None,
    activation_beta: list[float] | None = None,
    activations: list[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    hidden = r.shape[-1]
    x, count, initial = _setup(x, w, [initial_h], layout, hidden)
    functions = _activations(activations, ["Tanh"], activation_alpha, activation_beta, count)

    def step(d: int) -> Callable[[Tensor, _State], _State]:
        bias = 0 if b is None else b[d, :hidden] + b[d, hidden:]
        (f,) = functions[d]
        return lambda xt, state: (f(_limit(xt @ w[d].T + state[0] @ r[d].T + bias, clip)),)

    return _finish(*_run(x, sequence_lens, initial, [step(d) for d in range(count)], direction == "reverse"), layout)


@operator("GRU")
def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: list[float] | None = None,
    activation_beta: list[float] | None = None,
    activations: list[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
) -> tuple[Tensor, ...]:
    """Gates in the order update, reset, hidden."""
    hidden = r.shape[-1]
    x, count, initial = _setup(x, w, [initial_h], layout, hidden)
    functions = _activations(activations, ["Sigmoid", "Tanh"], activation_alpha, activation_beta, count)
    biases = torch.zeros(count, 6 * hidden, dtype=x.dtype) if b is None else b

    def step(d: int) -> Callable[[Tensor, _State], _State]:
        f, g = functions[d]
        wb, rb = biases[d, : 3 * hidden], biases[d, 3 * hidden :]

        def advance(xt: Tensor, state: _State) -> _State:
            (h,) = state
            inputs = xt @ w[d].T + wb
            gates = f(_limit(inputs[:, : 2 * hidden] + h @ r[d, : 2 * hidden].T + rb[: 2 * hidden], clip))
            update, reset = gates[:, :hidden], gates[:, hidden:]
            if linear_before_reset:
                recurrent = reset * (h @ r[d, 2 * hidden :].T + rb[2 * hidden :])
            else:
                recurrent = (reset * h) @ r[d, 2 * hidden :].T + rb[2 * hidden :]
            candidate = g(_limit(inputs[:, 2 * hidden :] + recurrent, clip))
            return ((1 - update) * candidate + update * h,)

        return advance

    return _finish(*_run(x, sequence_lens, initial, [step(d) for d in range(count)], direction == "reverse"), layout)


@operator("LSTM")
def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    peepholes: Tensor | None = None,
    *,
    activation_alpha: list[float] | None = None,
    activation_beta: list[float] | None = None,
    activations: list[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    """Gates in the order input, output, forget, cell."""
    hidden = r.shape[-1]
    x, count, initial = _setup(x, w, [initial_h, initial_c], layout, hidden)
    functions = _activations(activations, ["Sigmoid", "Tanh", "Tanh"], activation_alpha, activation_beta, count)

    def step(d: int) -> Callable[[Tensor, _State], _State]:
        f, g, last = functions[d]
        bias: Any = 0 if b is None else b[d, : 4 * hidden] + b[d, 4 * hidden :]
        peep = [torch.zeros(hidden)] * 3 if peepholes is None else list(peepholes[d].split(hidden))

        def advance(xt: Tensor, state: _State) -> _State:
            h, c = state
            i, o, forget, cell = (xt @ w[d].T + h @ r[d].T + bias).split(hidden, 1)
            i = f(_limit(i + peep[0] * c, clip))
            forget = 1 - i if input_forget else f(_limit(forget + peep[2] * c, clip))
            c = forget * c + i * g(_limit(cell, clip))
            o = f(_limit(o + peep[1] * c, clip))
            return (o * last(c), c)

        return advance

    return _finish(*_run(x, sequence_lens, initial, [step(d) for d in range(count)], direction == "reverse"), layout)
