"""Control flow (a subgraph arrives as a function from its inputs to a tuple), sequences, optionals, strings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trine.graph.dtypes import from_onnx
from trine.graph.operators.registry import operator
from trine.graph.operators.room import room_for
from trine.graph.operators.structure import ints

Body = Callable[..., tuple[Any, ...]]


@operator("If")
def if_(condition: Tensor, *, then_branch: Body, else_branch: Body) -> tuple[Any, ...]:
    return then_branch() if bool(condition.reshape(())) else else_branch()


@operator("Loop")
def loop(
    trips: Tensor | None = None,
    condition: Tensor | None = None,
    *carried: Any,
    body: Body,
    scan_shapes: Any = None,
    _outputs: int = 0,
) -> tuple[Any, ...]:
    """body(i, condition, carried…) gives (condition, carried…, scanned…); scanned outputs are stacked."""
    state = list(carried)
    going = condition is None or bool(condition.reshape(()))
    limit = None if trips is None else int(trips)
    scanned: list[list[Tensor]] = []
    step = 0
    while going and (limit is None or step < limit):
        keep, *rest = body(torch.tensor(step), torch.tensor(going), *state)
        state = rest[: len(state)]
        extra = rest[len(state) :]
        scanned = scanned or [[] for _ in extra]
        for rows, row in zip(scanned, extra, strict=True):
            rows.append(row)
        going = bool(keep.reshape(()))
        step += 1
    if not scanned and scan_shapes:
        return (*state, *(_no_rows(*described) for described in scan_shapes))
    if _outputs > len(state) + len(scanned):
        raise ValueError("no round was run, and nothing says the shape of the outputs that rounds add to")
    return (*state, *(torch.stack(rows) for rows in scanned))


def _no_rows(onnx_type: int, *shape: int) -> Tensor:
    kind = from_onnx(onnx_type)
    return torch.zeros(0, *shape, dtype=None if kind is None else kind.torch)


@operator("Scan")
def scan(
    *inputs: Any,
    body: Body,
    num_scan_inputs: int,
    scan_input_axes: list[int] | None = None,
    scan_input_directions: list[int] | None = None,
    scan_output_axes: list[int] | None = None,
    scan_output_directions: list[int] | None = None,
    batched: int = 0,
) -> tuple[Any, ...]:
    """body(state…, slices…) gives (state…, rows…). `batched` is the first version: lengths, and a batch axis."""
    if batched:
        return _scan_rows(inputs, body, num_scan_inputs, scan_input_directions)
    split = len(inputs) - num_scan_inputs
    state, sources = list(inputs[:split]), inputs[split:]
    axes = scan_input_axes or [0] * num_scan_inputs
    turned = scan_input_directions or [0] * num_scan_inputs
    slices = [x.flip(axis) if turn else x for x, axis, turn in zip(sources, axes, turned, strict=True)]
    rows: list[list[Tensor]] = []
    for step in range(sources[0].shape[axes[0]]):
        results = body(*state, *(x.select(axis, step) for x, axis in zip(slices, axes, strict=True)))
        state = list(results[:split])
        rows = rows or [[] for _ in results[split:]]
        for column, row in zip(rows, results[split:], strict=True):
            column.append(row)
    outputs = [
        torch.stack(column, axis) for column, axis in zip(rows, scan_output_axes or [0] * len(rows), strict=True)
    ]
    turned = scan_output_directions or [0] * len(rows)
    axes = scan_output_axes or [0] * len(rows)
    return (*state, *(y.flip(axis) if turn else y for y, axis, turn in zip(outputs, axes, turned, strict=True)))


def _scan_rows(
    inputs: tuple[Any, ...], body: Body, num_scan_inputs: int, directions: list[int] | None
) -> tuple[Any, ...]:
    lengths, *rest = inputs
    split = len(rest) - num_scan_inputs
    batch = rest[-1].shape[0]
    results = []
    for row in range(batch):
        own = [x[row] for x in rest]
        if lengths is not None:
            own[split:] = [x[: int(lengths[row])] for x in own[split:]]
        results.append(scan(*own, body=body, num_scan_inputs=num_scan_inputs, scan_input_directions=directions))
    longest = rest[-1].shape[1]
    merged = []
    for index, column in enumerate(zip(*results, strict=True)):
        if index >= split:
            column = tuple(torch.cat([y, y.new_zeros(longest - y.shape[0], *y.shape[1:])]) for y in column)
        merged.append(torch.stack(column))
    return tuple(merged)


@operator("Gradient")
def gradient(*inputs: Tensor, body: Body) -> tuple[Tensor, ...]:
    """Derivatives of the sum of body's result by each input; zero for one that it does not depend on."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.clone().requires_grad_() for x in inputs]
        (y,) = body(*leaves)
        found = torch.autograd.grad(y.sum(), leaves, allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True))


@operator("SequenceConstruct")
def sequence_construct(*items: Any) -> list[Any]:
    return list(items)


@operator("SequenceEmpty")
def sequence_empty(*, dtype: int = 1) -> list[Any]:
    return []


@operator("SequenceLength")
def sequence_length(sequence: list[Any]) -> Tensor:
    return torch.tensor(len(sequence))


@operator("SequenceAt")
def sequence_at(sequence: list[Any], position: Tensor) -> Any:
    return sequence[int(position)]


@operator("SequenceInsert")
def sequence_insert(sequence: list[Any], item: Any, position: Tensor | None = None) -> list[Any]:
    place = len(sequence) if position is None else int(position)
    place = place + len(sequence) if place < 0 else place
    if not 0 <= place <= len(sequence):
        raise IndexError(f"position {place} is out of range for a sequence of {len(sequence)}")
    return [*sequence[:place], item, *sequence[place:]]


@operator("SequenceErase")
def sequence_erase(sequence: list[Any], position: Tensor | None = None) -> list[Any]:
    place = -1 if position is None else int(position)
    place = range(len(sequence))[place]
    return [item for index, item in enumerate(sequence) if index != place]


@operator("SequenceMap")
def sequence_map(sequence: list[Any], *others: Any, body: Body) -> tuple[list[Any], ...]:
    """body on each item, with the items of other sequences at the same place, and other tensors as they are."""
    columns = [
        body(item, *(other[i] if isinstance(other, list) else other for other in others))
        for i, item in enumerate(sequence)
    ]
    return tuple(list(column) for column in zip(*columns, strict=True))


@operator("ConcatFromSequence")
def concat_from_sequence(sequence: list[Tensor], *, axis: int, new_axis: int = 0) -> Tensor:
    return torch.stack(sequence, axis) if new_axis else torch.cat(sequence, axis)


@operator("SplitToSequence")
def split_to_sequence(x: Tensor, split: Tensor | None = None, *, axis: int = 0, keepdims: int = 1) -> list[Tensor]:
    length = x.shape[axis]
    if split is None:
        return list(x.split(1, axis)) if keepdims else list(x.unbind(axis))
    if split.dim() == 0:
        return list(x.split(int(split), axis)) if length else []
    return list(x.split(ints(split), axis))


@operator("Optional")
def optional(x: Any = None, *, type: Any = None) -> Any:
    return x


@operator("OptionalHasElement")
def optional_has_element(x: Any = None) -> Tensor:
    return torch.tensor(x is not None)


@operator("OptionalGetElement")
def optional_get_element(x: Any) -> Any:
    if x is None:
        raise ValueError("OptionalGetElement of an optional without an element")
    return x


@operator("StringConcat")
def string_concat(a: Any, b: Any) -> Any:
    return np.asarray(np.char.add(a.astype(str), b.astype(str))).astype(object)


@operator("StringSplit")
def string_split(x: Any, *, delimiter: str | None = None, maxsplit: int | None = None) -> tuple[Any, Tensor]:
    """Parts of each string, filled up with empty ones to the longest, and how many each has."""
    parts = [str(text).split(delimiter or None, -1 if maxsplit is None else maxsplit) for text in x.ravel()]
    parts = [[] if part == [""] and not delimiter else part for part in parts]
    longest = max(map(len, parts), default=0)
    table = np.array([part + [""] * (longest - len(part)) for part in parts], dtype=object)
    counts = torch.tensor([len(part) for part in parts], dtype=torch.int64).reshape(x.shape)
    return table.reshape(*x.shape, longest), counts


@operator("RegexFullMatch")
def regex_full_match(x: Any, *, pattern: str) -> Tensor:
    compiled = re.compile(pattern)
    hits = np.array([compiled.fullmatch(str(text)) is not None for text in x.ravel()], dtype=bool)
    return torch.from_numpy(hits.reshape(x.shape))


@operator("StringNormalizer")
def string_normalizer(
    x: Any,
    *,
    case_change_action: str = "NONE",
    is_case_sensitive: int = 0,
    locale: str = "",
    stopwords: list[str] | None = None,
) -> Any:
    """Strings [C] or [1, C] without the stop words, in one case; at least one, if empty, is left."""
    words = [str(text) for text in x.ravel()]
    fold: Callable[[str], str] = str if is_case_sensitive else str.lower
    banned = {fold(word) for word in stopwords or []}
    words = [word for word in words if fold(word) not in banned] or [""]
    changes: dict[str, Callable[[str], str]] = {"NONE": str, "LOWER": str.lower, "UPPER": str.upper}
    change = changes[case_change_action]
    return np.array([change(word) for word in words], dtype=object).reshape((1, -1) if x.ndim == 2 else (-1,))


@operator("TfIdfVectorizer")
def tf_idf_vectorizer(
    x: Any,
    *,
    max_gram_length: int,
    max_skip_count: int,
    min_gram_length: int,
    mode: str,
    ngram_counts: list[int],
    ngram_indexes: list[int],
    pool_int64s: list[int] | None = None,
    pool_strings: list[str] | None = None,
    weights: list[float] | None = None,
) -> Tensor:
    """Counts of the pool's n-grams in each row, with up to max_skip_count items left out between neighbours."""
    pool: list[Any] = list(pool_strings) if pool_strings is not None else list(pool_int64s or [])
    grams: dict[tuple[Any, ...], int] = {}
    bounds = [*ngram_counts, len(pool)]
    for length, (start, stop) in enumerate(pairwise(bounds), 1):
        for place in range(start, stop, length):
            grams[tuple(pool[place : place + length])] = len(grams)
    rows = x.reshape(1, -1) if x.ndim == 1 else x
    counts = torch.zeros(rows.shape[0], max(ngram_indexes) + 1)
    for row, items in enumerate(rows.tolist()):
        for gram, count in _skip_grams(items, min_gram_length, max_gram_length, max_skip_count).items():
            if gram in grams:
                counts[row, ngram_indexes[grams[gram]]] += count
    if mode != "TF":
        factors = torch.ones(counts.shape[1])
        for index, weight in zip(ngram_indexes, weights or [1.0] * len(ngram_indexes), strict=True):
            factors[index] = weight
        counts = (counts if mode == "TFIDF" else (counts > 0).float()) * factors
    return counts.reshape(-1) if x.ndim == 1 else counts


def _skip_grams(items: list[Any], shortest: int, longest: int, skips: int) -> Counter[tuple[Any, ...]]:
    found: Counter[tuple[Any, ...]] = Counter()
    for length in range(shortest, longest + 1):
        for skip in range(skips + 1 if length > 1 else 1):
            reach = (length - 1) * (skip + 1) + 1
            for start in range(len(items) - reach + 1):
                found[tuple(items[start : start + reach : skip + 1])] += 1
    return found


@operator("RandomNormal", "RandomUniform", pure=False)
def random(
    *,
    shape: list[int],
    dtype: int = 1,
    high: float = 1.0,
    low: float = 0.0,
    mean: float = 0.0,
    scale: float = 1.0,
    seed: float | None = None,
    normal: int,
) -> Tensor:
    """Uniform in [low, high), or normal; the same seed gives the same numbers."""
    kind = from_onnx(dtype)
    room_for(shape)
    generator = _generator(seed)
    if normal:
        y = torch.randn(shape, generator=generator) * scale + mean
    else:
        y = torch.rand(shape, generator=generator) * (high - low) + low
    return y if kind is None else y.to(kind.torch)


def _generator(seed: float | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(int(np.float32(seed).view(np.uint32)))
    return generator


@operator("RandomNormalLike", "RandomUniformLike", pure=False)
def random_like(
    x: Tensor,
    *,
    dtype: int | None = None,
    high: float = 1.0,
    low: float = 0.0,
    mean: float = 0.0,
    scale: float = 1.0,
    seed: float | None = None,
    normal: int,
) -> Tensor:
    y = random(shape=list(x.shape), high=high, low=low, mean=mean, scale=scale, seed=seed, normal=normal)
    kind = None if dtype is None else from_onnx(dtype)
    return y.to(x.dtype if kind is None else kind.torch)


@operator("Bernoulli", pure=False)
def bernoulli(x: Tensor, *, dtype: int | None = None, seed: float | None = None) -> Tensor:
    kind = None if dtype is None else from_onnx(dtype)
    drawn = torch.rand(x.shape, generator=_generator(seed)) < x
    return drawn.to(x.dtype if kind is None else kind.torch)


@operator("Multinomial", pure=False)
def multinomial(x: Tensor, *, dtype: int = 6, sample_size: int = 1, seed: float | None = None) -> Tensor:
    """x [B, classes] are logarithms of unnormalised probabilities."""
    kind = from_onnx(dtype)
    drawn = torch.multinomial(torch.softmax(x.float(), -1), sample_size, True, generator=_generator(seed))
    return drawn if kind is None else drawn.to(kind.torch)
