"""preserve_ordering: responses leave in the order in which their requests came, whatever instance is done first."""

from __future__ import annotations

from collections import deque

from trine.server.answers import Answers
from trine.server.instances import Batch
from trine.server.request import InferRequest, InferResponse


class InOrder:
    """Holds back what is done before an earlier batch is."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._running: deque[Batch] = deque()
        self._computed: set[int] = set()
        self._held: dict[int, list[InferResponse]] = {}

    def started(self, batch: Batch) -> None:
        """The batch goes to an instance: after all before it."""
        self._running.append(batch)

    def finish(self, batch: Batch) -> None:
        """A batch is computed; it is answered when those before it are."""
        self._computed.add(id(batch))
        self._advance()

    def deliver(self, request: InferRequest, response: InferResponse) -> None:
        """A response of an instance that answers by itself."""
        if self._running and request in self._running[0].requests:
            self._answers.deliver(request, response)
            self._advance()
        else:
            self._held.setdefault(id(request), []).append(response)

    def _advance(self) -> None:
        running = self._running
        while running:
            head = running[0]
            for request in head.requests:
                for response in self._held.pop(id(request), ()):
                    self._answers.deliver(request, response)
            if id(head) not in self._computed:
                return
            answers_itself = head.outputs is None and head.error is None
            if answers_itself and not all(request.done for request in head.requests):
                return
            self._computed.discard(id(head))
            running.popleft()
            self._answers.finish(head)
