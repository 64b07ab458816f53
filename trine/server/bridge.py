"""From any thread into the event loop: one wake-up for all that was posted since the last."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("trine.server")


class LoopBridge:
    """Runs functions in the event loop's thread, in the order they were posted."""

    __slots__ = ("_armed", "_posted", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._posted: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._armed = False

    def post(self, function: Callable[..., None], *arguments: Any) -> None:
        """Run `function(*arguments)` soon. From any thread; nothing happens once the loop is closed."""
        self._posted.append((function, arguments))
        if not self._armed:  # set before the drain looks, so what is appended after it is set will be seen
            self._armed = True
            try:
                self.loop.call_soon_threadsafe(self._drain)
            except RuntimeError:  # the loop is closed: nobody is left to tell
                self._armed = False

    def _drain(self) -> None:
        self._armed = False
        posted = self._posted
        while posted:
            function, arguments = posted.popleft()
            try:
                function(*arguments)
            except Exception:
                logger.exception("a posted function failed")
