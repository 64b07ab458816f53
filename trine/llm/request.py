"""A sequence in the engine, and the messages that carry it in and out."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from trine.llm.outputs import EngineStats, FinishReason
from trine.llm.sampling.params import SamplingParams

if TYPE_CHECKING:
    from trine.llm.sampling.grammar import GrammarState


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One sequence to generate, checked and tokenised: what crosses into the engine.

    `priority`: lower goes first. `time_limit`: seconds from arrival until it is given up. `salt` keeps its cache blocks
    apart from those of sequences with another salt.
    """

    id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    bad_words_token_ids: list[list[int]] = field(default_factory=list)
    priority: int = 0
    time_limit: float | None = None
    salt: str | None = None


class TokenScores(NamedTuple):
    """Log-probabilities at one position: the token that was chosen, then the most probable ones."""

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]

    def cut(self, k: int) -> TokenScores:
        """The same with the k most probable tokens only: a step computes as many as its greediest request asks for."""
        return (
            self
            if len(self.top_ids) == k
            else self._replace(top_ids=self.top_ids[:k], top_logprobs=self.top_logprobs[:k])
        )


class SequenceOutput(NamedTuple):
    """What one step added to one sequence: what crosses out of the engine."""

    id: int
    token_ids: list[int]
    scores: list[TokenScores] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    prompt_scores: list[TokenScores] | None = None
    first_scheduled: float | None = None
    error: str | None = None


class StepOutput(NamedTuple):
    """Everything that one step of the engine has to say."""

    outputs: list[SequenceOutput]
    stats: EngineStats


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """The scheduler's view of a request: `num_computed` of its tokens are in the cache (or on their way there).

    `tokens` are prompt and known output; `num_in_flight` more have been launched but not read back yet. So
    `num_tokens - num_computed` tokens are to be computed before the next one can be sampled: one while decoding, many
    at first or after a preemption. That difference is all that the scheduler looks at.
    """

    __slots__ = (
        "arrival",
        "block_ids",
        "deadline",
        "finish_reason",
        "first_scheduled",
        "grammar",
        "id",
        "identities",
        "max_tokens",
        "num_cached",
        "num_computed",
        "num_in_flight",
        "num_named",
        "num_prompt",
        "order",
        "params",
        "prompt_scores",
        "request",
        "row",
        "status",
        "stop_ids",
        "tokens",
    )

    def __init__(self, request: SequenceRequest, arrival: float, order: int, eos_token_ids: tuple[int, ...]) -> None:
        self.request = request
        self.id = request.id
        self.params = request.params
        self.tokens = list(request.prompt_token_ids)
        self.num_prompt = len(self.tokens)
        self.max_tokens = request.max_tokens
        self.stop_ids = frozenset(request.params.stop_token_ids).union(
            () if request.params.ignore_eos else eos_token_ids
        )
        self.arrival = arrival
        self.order = (request.priority, order)
        self.deadline = None if request.time_limit is None else arrival + request.time_limit
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.row = -1
        self.block_ids: list[int] = []
        self.identities: list[bytes] = []
        self.num_computed = 0
        self.num_in_flight = 0
        self.num_named = 0
        self.num_cached = -1
        self.first_scheduled: float | None = None
        self.grammar: GrammarState | None = None
        self.prompt_scores: list[TokenScores] | None = [] if self.params.prompt_logprobs is not None else None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) + self.num_in_flight

    @property
    def num_output(self) -> int:
        """Output tokens, those in flight included."""
        return len(self.tokens) + self.num_in_flight - self.num_prompt

    @property
    def wants_prompt_scores(self) -> bool:
        """Whether prompt positions still have to be computed for their log-probabilities, cached or not."""
        return self.prompt_scores is not None and len(self.prompt_scores) < self.num_prompt - 1
