"""Services on a small random checkpoint: in this process for what needs looking inside, as a process for faults."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.checkpoints import save_checkpoint
from trine.llm.api import AsyncLLM
from trine.server.http.server import HttpServer
from trine.server.listening import listen
from trine.service.openai.app import Application, create_app
from trine.service.settings import ServiceSettings


class Running:
    """A service on a socket of this machine, and a client for it."""

    def __init__(self, app: Application, engine: AsyncLLM, client: httpx.AsyncClient) -> None:
        self.app = app
        self.engine = engine
        self.client = client

    async def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return await self.client.post(path, json=body, **options)

    async def until(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        """Wait for something that is on its way; fails if it does not come."""
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.01)


Start = Callable[..., Awaitable[Running]]


@asynccontextmanager
async def running(checkpoint: Path, settings: ServiceSettings, options: dict[str, Any]) -> AsyncIterator[Running]:
    engine = AsyncLLM(
        options.pop("model", checkpoint), dtype="float32", **{"engine_process": False, "threads": 1, **options}
    )
    app = create_app(engine, settings=settings)
    listener = listen("127.0.0.1", 0, "--port")
    server = HttpServer(app)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        try:
            await engine.start()
            yield Running(app, engine, client)
        finally:
            await engine.close()
            server.should_exit = True
            await serving
            listener.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture
async def start(checkpoint: Path) -> AsyncIterator[Start]:
    """`await start(settings={…}, **engine options)`; stopped at the end of the test."""
    async with AsyncExitStack() as stack:

        async def begin(settings: dict[str, Any] | None = None, **options: Any) -> Running:
            made = ServiceSettings(**{"served_model_names": ("small",), "access_log": False, **(settings or {})})
            return await stack.enter_async_context(running(checkpoint, made, options))

        yield begin
