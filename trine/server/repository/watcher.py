"""Poll mode: looks at the folders from time to time and says what has changed.

A change counts once a folder has looked the same twice: somebody may be writing into it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor

from trine.core.errors import TrineError
from trine.server.repository.files import ModelFolder, Signature
from trine.server.repository.sources import Sources

logger = logging.getLogger("trine.server")

_SETTLE_SECONDS = 0.5  # at least so long a changed folder must stay as it is

Follow = Callable[[Mapping[str, ModelFolder], set[str], set[str]], Awaitable[None]]
Look = tuple[dict[str, ModelFolder], dict[str, tuple[Signature, ...]]]


class Watcher:
    """Calls `follow(changed, gone, known)` with the folders that changed, and the names that are gone and there."""

    def __init__(self, sources: Sources, seconds: float, follow: Follow, *, namespacing: bool = False) -> None:
        self._sources = sources
        self._seconds = seconds
        self._follow = follow
        self._namespacing = namespacing
        self._seen: dict[str, tuple[Signature, ...]] = {}
        self._task: asyncio.Task[None] | None = None
        self._threads: Executor | None = None

    async def remember(self, threads: Executor) -> None:
        """Take the folders as they are now for known. Before the first load: what changes while it runs is seen."""
        self._threads = threads
        self._seen = (await self._look())[1]

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            try:
                await self._turn()
            except TrineError as error:
                logger.error("the model repository can't be polled: %s", error.message)
            except Exception:
                logger.exception("the model repository can't be polled")

    async def _turn(self) -> None:
        folders, signatures = await self._look()
        changed = {name for name in folders if self._seen.get(name) != signatures[name]}
        gone = set(self._seen) - set(folders)
        if not changed and not gone:
            return
        await asyncio.sleep(min(_SETTLE_SECONDS, self._seconds))
        folders, later = await self._look()
        settled = {name: folders[name] for name in changed if name in folders and later[name] == signatures[name]}
        gone = {name for name in gone if name not in folders}
        for name in settled:
            self._seen[name] = later[name]
        for name in gone:
            del self._seen[name]
        if settled or gone:
            await self._follow(settled, gone, set(folders))

    async def _look(self) -> Look:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._read)

    def _read(self) -> Look:
        folders, twice = self._sources.folders()
        if not self._namespacing:
            folders = {name: folder for name, folder in folders.items() if name not in twice}
        return folders, {name: folder.whole_signature() for name, folder in folders.items()}
