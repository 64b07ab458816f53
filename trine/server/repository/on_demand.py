"""Models that are loaded when somebody asks for them, and leave when others are used more."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from time import monotonic

from trine.core.errors import TrineError
from trine.server.repository.entries import ModelEntry

logger = logging.getLogger("trine.server")

_FAILED_SECONDS = 1.0  # a model that could not be loaded is not tried again for so long


class OnDemand:
    """Keeps at most `limit` models loaded; 0: as many as there are, and none is loaded because it is asked for.

    load      loads a model by its name, if it is there; raises TrineError
    withdraw  stops serving a model
    is_needed whether a model that is served needs this one
    """

    def __init__(
        self,
        limit: int,
        entries: Mapping[str, ModelEntry],
        load: Callable[[str], Awaitable[None]],
        withdraw: Callable[[ModelEntry], None],
        is_needed: Callable[[str], bool],
    ) -> None:
        self._limit = limit
        self._entries = entries
        self._load = load
        self._withdraw = withdraw
        self._is_needed = is_needed
        self._awaited: dict[str, list[Callable[[], None]]] = {}
        self._failed_until: dict[str, float] = {}

    def wants(self, name: str) -> bool:
        """Whether a model that is asked for has to be loaded first, as far as its entry says."""
        if not self._limit:
            return False
        entry = self._entries.get(name)
        return (entry is None or entry.newest is None) and monotonic() > self._failed_until.get(name, 0.0)

    def wait(self, name: str, again: Callable[[], None]) -> bool:
        """Call `again` once `load` is over. False: nobody loads the model yet, `load` has to be run."""
        waiting = self._awaited.setdefault(name, [])
        waiting.append(again)
        return len(waiting) > 1

    async def load(self, name: str) -> None:
        """Load a model, then call whoever waits for it, whether it could be loaded or not."""
        try:
            await self._load(name)
        except TrineError as error:
            logger.error("model %s can't be loaded on demand: %s", name, error.message)
            self._failed_until[name] = monotonic() + _FAILED_SECONDS
        for again in self._awaited.pop(name):
            again()

    def evict(self, keep: str) -> None:
        """Unload the models that were used least recently, those with requests aside, until `limit` are left."""
        if not self._limit:
            return
        served = [entry for entry in self._entries.values() if entry.newest is not None]
        surplus = len(served) - self._limit
        for entry in sorted(served, key=lambda entry: entry.last_used_ms):
            if surplus <= 0:
                return
            if entry.name == keep or entry.lock.locked() or entry.busy or self._is_needed(entry.name):
                continue
            self._withdraw(entry)
            surplus -= 1
