"""What the engine's users get back: plain records, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "deadline", "error"]


@dataclass(slots=True)
class Logprob:
    """Natural log-probability of one token in the model's own distribution (before temperature and filters).

    `rank` is 1 for the most probable token of the vocabulary. `token` is the token's text ("" when not detokenised).
    """

    logprob: float
    rank: int
    token: str = ""


TokenLogprobs = dict[int, Logprob]
"""The sampled token's and the k most probable tokens' log-probabilities at one position, by token id."""


@dataclass(slots=True)
class Delta:
    """What one engine step added to one sequence of a request.

    `index` numbers the sequences of a request (n > 1). `text` is final: it never ends within a character, and never
    holds a part of what may still become a stop string. `token_ids` may be empty (text flushed at the end).
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence. `stop_reason`: the stop string or token id that ended it; None for end-of-sequence."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestTimes:
    """`time.monotonic()` seconds; None while it has not happened."""

    arrival: float
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request's result. `num_cached_tokens` prompt tokens were served from the prefix cache."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    times: RequestTimes | None = None


@dataclass(slots=True)
class EngineStats:
    """The engine's state after a step; counters only grow."""

    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
