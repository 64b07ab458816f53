"""Closed-loop load: so many clients, each sending its next request when the last one has been answered."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from trine.core.errors import TrineError


@dataclass(slots=True)
class Answer:
    """Times are seconds since the request was sent. `arrivals`: when each piece came, and the tokens in it."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    total: float = 0.0
    error: str | None = None

    @property
    def first(self) -> float:
        """Time to the first token."""
        return self.arrivals[0][0]

    @property
    def per_token(self) -> float | None:
        """Mean time of a token after the first; None for one token."""
        more = self.output_tokens - 1
        return (self.arrivals[-1][0] - self.first) / more if more > 0 else None


class Target(Protocol):
    """What takes requests. `stream` yields token counts as they come and fills in the answer's token counts."""

    def stream(self, number: int, answer: Answer) -> AsyncIterator[int]: ...


@dataclass(slots=True)
class Level:
    """What one level of concurrency gave. `seconds` is the wall time of all its requests."""

    concurrency: int
    seconds: float
    answers: list[Answer]

    @property
    def good(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.error is None]

    def summary(self) -> dict[str, float | int | None]:
        """Rates in tokens/s, times in ms: to the first token, mean of a token after it, gaps between pieces, whole."""
        good = self.good
        output = sum(answer.output_tokens for answer in good)
        prompt = sum(answer.prompt_tokens for answer in good)
        series = {
            "ttft": [answer.first for answer in good],
            "tpot": [answer.per_token for answer in good if answer.per_token is not None],
            "itl": [gap for answer in good for gap in gaps(answer)],
            "e2e": [answer.total for answer in good],
        }
        facts: dict[str, float | int | None] = {
            "concurrency": self.concurrency,
            "requests": len(self.answers),
            "failed": len(self.answers) - len(good),
            "seconds": round(self.seconds, 3),
            "requests_per_s": round(len(good) / self.seconds, 3),
            "output_tokens_per_s": round(output / self.seconds, 1),
            "total_tokens_per_s": round((prompt + output) / self.seconds, 1),
            "output_tokens": output,
            "prompt_tokens": prompt,
        }
        for name, values in series.items():
            for share in (50, 90, 99):
                value = percentile(values, share)
                facts[f"{name}_p{share}_ms"] = None if value is None else round(1000 * value, 2)
        return facts


def gaps(answer: Answer) -> Iterator[float]:
    """Times between successive pieces: what a reader of the stream waits."""
    times = [time for time, _ in answer.arrivals]
    return (later - earlier for earlier, later in itertools.pairwise(times))


def percentile(values: list[float], share: float) -> float | None:
    """The value that `share` per cent of the values do not exceed, interpolated; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


async def run_level(
    target: Target, concurrency: int, num_requests: int, first: int = 0, done: Callable[[], object] = lambda: None
) -> Level:
    """Send requests `first` to `first + num_requests`, `concurrency` at a time. A failure is recorded, not raised."""
    numbers = iter(range(first, first + num_requests))
    answers: list[Answer] = []

    async def client() -> None:
        for number in numbers:  # shared: each client takes the next
            answer = await _ask(target, number)
            answers.append(answer)
            done()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(min(concurrency, num_requests))))
    return Level(concurrency, time.perf_counter() - started, answers)


async def _ask(target: Target, number: int) -> Answer:
    answer = Answer()
    started = time.perf_counter()
    try:
        async for tokens in target.stream(number, answer):
            answer.arrivals.append((time.perf_counter() - started, tokens))
        if not answer.arrivals:
            answer.error = "no tokens came"
    except (TrineError, OSError, EOFError, ValueError) as error:
        answer.error = str(error) or type(error).__name__
    answer.total = time.perf_counter() - started
    return answer
