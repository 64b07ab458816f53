"""Beam search, on top of an engine that can score one more token of many sequences at once.

The search is a generator: it yields the token sequences to extend and is sent, for each, its most probable next tokens.
The prefix cache makes each such request a matter of one block at most. Scores and stopping follow Transformers' beam
search: a hypothesis is worth its summed log-probability over its output length to the power of `length_penalty`.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from trine.core.errors import RequestError
from trine.llm.sampling.params import SamplingParams

Candidates = list[tuple[int, float]]
"""Token ids and log-probabilities of the most probable next tokens."""


@dataclass(frozen=True, slots=True)
class Beam:
    """An output so far. `logprob` is the sum over `token_ids`."""

    token_ids: list[int]
    logprob: float
    ended_by: int | None = None

    def score(self, length_penalty: float) -> float:
        return self.logprob / float(max(1, len(self.token_ids)) ** length_penalty)


def beam_search(
    params: SamplingParams, max_tokens: int, eos_token_ids: tuple[int, ...]
) -> Generator[list[list[int]], list[Candidates], list[Beam]]:
    """Yields outputs to extend; is sent `2 × width` candidates for each; returns the n best, best first."""
    _check(params)
    width = params.num_sequences
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))
    live = [Beam([], 0.0)]
    finished: list[Beam] = []
    for length in range(1, max_tokens + 1):
        candidates = yield [beam.token_ids for beam in live]
        extended = [
            Beam([*beam.token_ids, token], beam.logprob + logprob, token if token in ends else None)
            for beam, nexts in zip(live, candidates, strict=True)
            for token, logprob in nexts
            if not (token in ends and length <= params.min_tokens)
        ]
        extended.sort(key=lambda beam: -beam.logprob)
        # An end counts only if it is among the width best, as in Transformers: others would displace better live beams.
        finished += [beam for beam in extended[:width] if beam.ended_by is not None]
        finished = sorted(finished, key=lambda beam: -beam.score(params.length_penalty))[:width]
        live = [beam for beam in extended if beam.ended_by is None][:width]
        if not live or (len(finished) >= width and _settled(params, live[0], finished[-1], length, max_tokens)):
            break
    else:
        finished += live
    finished.sort(key=lambda beam: -beam.score(params.length_penalty))
    return finished[: params.n]


def _settled(params: SamplingParams, best_live: Beam, worst_finished: Beam, length: int, max_tokens: int) -> bool:
    """Whether no live beam can still displace a finished one."""
    if params.early_stopping is True:
        return True
    reach = max_tokens if params.early_stopping == "never" and params.length_penalty > 0 else length
    return best_live.logprob / float(reach**params.length_penalty) <= worst_finished.score(params.length_penalty)


def _check(params: SamplingParams) -> None:
    for name, off in (
        ("repetition_penalty", 1.0),
        ("presence_penalty", 0.0),
        ("frequency_penalty", 0.0),
        ("logit_bias", {}),
        ("bad_words", ()),
        ("stop", ()),
    ):
        if getattr(params, name) != off:
            raise RequestError(f"{name} can't be combined with use_beam_search: leave it out", param=name)
