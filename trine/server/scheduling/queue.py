"""The queue of a model: priority levels, limits, timeouts.

Requests wait in order of arrival within their level. One whose time is up is rejected or, where the policy says DELAY,
moved behind all others of its level.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from trine.server.request import InferRequest

DELAY = 1


class QueuePolicy:
    """Of one level: how many may wait and for how long."""

    __slots__ = ("allow_override", "delays", "max_size", "timeout_us")

    def __init__(self, message: Any | None) -> None:
        self.delays = message is not None and message.timeout_action == DELAY
        self.timeout_us: int = message.default_timeout_microseconds if message is not None else 0
        self.allow_override: bool = message is not None and message.allow_timeout_override
        self.max_size: int = message.max_queue_size if message is not None else 0

    def expires(self, request: InferRequest) -> int:
        """Monotonic nanoseconds at which the request has waited too long; 0: never. A client may only shorten it."""
        timeout = self.timeout_us
        if self.allow_override and request.timeout_us and (not timeout or request.timeout_us < timeout):
            timeout = request.timeout_us
        return request.queued_ns + timeout * 1000 if timeout else 0


class Level:
    """The requests of one priority: first those in time, then those delayed."""

    __slots__ = ("delayed", "policy", "waiting")

    def __init__(self, policy: QueuePolicy) -> None:
        self.policy = policy
        self.waiting: deque[InferRequest] = deque()
        self.delayed: deque[InferRequest] = deque()

    def __len__(self) -> int:
        return len(self.waiting) + len(self.delayed)


class RequestQueue:
    """What waits for a model. Iterating gives the requests in the order in which they go."""

    def __init__(self, batching: Any | None) -> None:
        levels = max(1, batching.priority_levels) if batching is not None else 1
        default = batching.default_queue_policy if batching is not None else None
        own = dict(batching.priority_queue_policy) if batching is not None else {}
        self.levels = [Level(QueuePolicy(own.get(level, default))) for level in range(1, levels + 1)]
        first = self.levels[0].policy
        self.plain = levels == 1 and not first.timeout_us and not first.allow_override and not first.max_size
        """Whether there is one level without any limit: then `waiting` of the first is all there is."""
        self.only = self.levels[0].waiting

    def __len__(self) -> int:
        return sum(len(level) for level in self.levels)

    def __iter__(self) -> Iterator[InferRequest]:
        for level in self.levels:
            yield from level.waiting
            yield from level.delayed

    def put(self, request: InferRequest) -> bool:
        """Add at the end of its level; False where that is full."""
        level = self.levels[request.priority - 1 if request.priority else 0] if len(self.levels) > 1 else self.levels[0]
        policy = level.policy
        if policy.max_size and len(level) >= policy.max_size:
            return False
        request.expires_ns = policy.expires(request)
        level.waiting.append(request)
        return True

    def popleft(self) -> InferRequest:
        """The next request to go; there must be one."""
        for level in self.levels:
            if level.waiting:
                return level.waiting.popleft()
            if level.delayed:
                return level.delayed.popleft()
        raise IndexError("the queue is empty")

    def take_expired(self, now_ns: int) -> list[InferRequest]:
        """Remove what is to be rejected now; delay what is to be delayed."""
        rejected: list[InferRequest] = []
        for level in self.levels:
            if not any(0 < request.expires_ns <= now_ns for request in level.waiting):
                continue
            kept: deque[InferRequest] = deque()
            for request in level.waiting:
                if not 0 < request.expires_ns <= now_ns:
                    kept.append(request)
                elif level.policy.delays:
                    request.expires_ns = 0
                    level.delayed.append(request)
                else:
                    rejected.append(request)
            level.waiting.clear()
            level.waiting.extend(kept)
        return rejected

    def next_expiry(self) -> int:
        """When the next request's time is up; 0: none has a limit."""
        times = [request.expires_ns for level in self.levels for request in level.waiting if request.expires_ns]
        return min(times, default=0)

    def take_cancelled(self) -> list[InferRequest]:
        """Remove what nobody waits for any more."""
        gone = [request for request in self if request.cancelled]
        if gone:
            for level in self.levels:
                for requests in (level.waiting, level.delayed):
                    kept = [request for request in requests if not request.cancelled]
                    requests.clear()
                    requests.extend(kept)
        return gone

    def take_all(self) -> list[InferRequest]:
        """Empty the queue."""
        everything = list(self)
        for level in self.levels:
            level.waiting.clear()
            level.delayed.clear()
        return everything
