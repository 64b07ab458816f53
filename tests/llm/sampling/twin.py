"""The sampler's slow twin: one row at a time, Python numbers, no vectorisation. What it says is what sampling means."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from trine.llm.sampling.params import SamplingParams

Row = np.ndarray


def edit(
    logits: Sequence[float],
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    eos: Sequence[int],
    bad_words: Sequence[Sequence[int]],
    allowed: Sequence[bool] | None,
) -> list[float]:
    """The logits after penalties, biases, forbidden tokens and the grammar's mask, in float32."""
    penalised = [np.float32(value) for value in logits]
    for token in set(prompt) | set(output):
        strength = np.float32(params.repetition_penalty)
        value = penalised[token]
        penalised[token] = value / strength if value > 0 else value * strength
    for token in set(output):
        penalised[token] -= np.float32(params.presence_penalty)
        penalised[token] -= np.float32(params.frequency_penalty) * np.float32(output.count(token))
    result = list(penalised)
    for token, bias in params.logit_bias.items():
        result[token] += np.float32(bias)
    for word in bad_words:
        if list(output[len(output) - len(word) + 1 :] if len(word) > 1 else []) == list(word[:-1]):
            result[word[-1]] = -math.inf
    if len(output) < params.min_tokens:
        for token in [*params.stop_token_ids, *(() if params.ignore_eos else eos)]:
            result[token] = -math.inf
    if allowed is not None:
        masked = [value if ok else -math.inf for value, ok in zip(result, allowed, strict=True)]
        if max(masked) == -math.inf:
            masked = [value if ok else -math.inf for value, ok in zip(penalised, allowed, strict=True)]
        result = masked
    return [float(value) for value in result]


def choices(logits: Sequence[float], params: SamplingParams, uniform: float) -> set[int]:
    """The token of `choose`, and those that the last bits of exponentials, which differ by library, can make of it."""
    rounding = (0.0, -2e-6, 2e-6)
    tokens = set()
    for shift in rounding:
        for change in rounding if params.top_p < 1.0 else (0.0,):
            varied = params.replace(top_p=min(1.0, params.top_p + change))
            tokens.add(choose(logits, varied, min(max(uniform + shift, 0.0), 1.0 - 2**-53)))
    return tokens


def choose(logits: Sequence[float], params: SamplingParams, uniform: float) -> int:
    """The token drawn with the uniform number; the first of the largest when greedy."""
    if params.greedy or params.top_k == 1:
        return max(range(len(logits)), key=lambda token: (logits[token], -token))
    inverse = np.float32(1) / np.float32(params.temperature)
    z = [(np.float32(value) - np.float32(max(logits))) * inverse for value in logits]
    weight = [int(value) for value in (torch.exp(torch.tensor(z)) * 2.0**34).round().tolist()]
    order = sorted(range(len(z)), key=lambda token: -z[token])
    limit = -math.inf
    if params.top_k:
        limit = float(z[order[min(params.top_k, len(z)) - 1]])
    if params.top_p < 1.0:
        left = [token for token in order if z[token] >= limit]
        target, reached = params.top_p * sum(weight[token] for token in left), 0
        for token in left:
            reached += weight[token]
            if reached >= target:
                limit = max(limit, float(z[token]))
                break
    if params.min_p > 0.0:
        limit = max(limit, float(np.float32(math.log(params.min_p))))
    kept = [token for token in range(len(z)) if z[token] >= limit]
    target, reached = math.floor(uniform * sum(weight[token] for token in kept)), 0
    for token in kept:
        reached += weight[token]
        if reached > target:
            return token
    raise AssertionError("the cumulative weight passes any share of it")
