"""A repository in this process, for tests of back ends: ask a model, get what it answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import uvloop

from trine.server.errors import ServerError
from trine.server.repository import Repository, RepositorySettings
from trine.server.request import InferRequest, InferResponse, RequestedOutput
from trine.server.tensors import Tensor

T = TypeVar("T")
Arrays = Mapping[str, np.ndarray[Any, Any] | Tensor]
SECONDS = 60.0


class Asked:
    """A request that was submitted, and what came of it so far."""

    def __init__(self, loop: asyncio.AbstractEventLoop, model: str, inputs: Arrays, **options: Any) -> None:
        self.responses: list[InferResponse] = []
        self.finished: asyncio.Future[None] = loop.create_future()
        tensors = {
            name: array if isinstance(array, Tensor) else Tensor.of(name, array) for name, array in inputs.items()
        }
        self.request = InferRequest(model, tensors, self._respond, **options)

    def _respond(self, response: InferResponse) -> None:
        self.responses.append(response)
        if response.final:
            self.finished.set_result(None)


class Served:
    """A started repository over one folder, with an event loop that runs while a method waits."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self.loop = self._runner.get_loop()
        self.repository = Repository(RepositorySettings(directories=(str(folder),), **settings))

    def __enter__(self) -> Served:
        try:
            self.run(self.repository.start())
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run(self.repository.close(5.0))
        self._runner.close()

    def run(self, awaitable: Awaitable[T]) -> T:
        async def wait() -> T:
            return await asyncio.wait_for(awaitable, SECONDS)

        return self._runner.run(wait())

    def sleep(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    def call(self, function: Callable[[], object]) -> None:
        """Call something in the event loop's thread, while the loop runs."""

        async def call() -> None:
            function()

        self.run(call())

    def submit(self, model: str, inputs: Arrays, *, version: str = "", **options: Any) -> Asked:
        """Begin a request; ServerError where it is refused at once."""
        asked = self.prepare(model, inputs, version=version, **options)
        self.call(lambda: self.begin(asked))
        return asked

    def prepare(self, model: str, inputs: Arrays, *, version: str = "", **options: Any) -> Asked:
        """A request that is not begun."""
        outputs: Sequence[str] | None = options.pop("outputs", None)
        if outputs is not None:
            options["outputs"] = [RequestedOutput(name) for name in outputs]
        return Asked(self.loop, model, inputs, model_version=version, **options)

    def begin(self, asked: Asked) -> None:
        """In the event loop's thread, while the loop runs."""
        request = asked.request
        self.repository.model(request.model_name, request.model_version).submit(request)

    def responses(self, model: str, inputs: Arrays, **options: Any) -> list[InferResponse]:
        """Every response, up to the final one."""
        asked = self.submit(model, inputs, **options)
        self.run(asked.finished)
        return asked.responses

    def ask(self, model: str, inputs: Arrays, **options: Any) -> dict[str, np.ndarray[Any, Any]]:
        """The outputs of the only response with any; ServerError where it is an error."""
        filled = [response for response in self.responses(model, inputs, **options) if not response.is_empty]
        assert len(filled) == 1
        return arrays(filled[0])


def arrays(response: InferResponse) -> dict[str, np.ndarray[Any, Any]]:
    """A response's outputs by name. ServerError: its error."""
    if response.error is not None:
        raise response.error
    return {tensor.name: tensor.array for tensor in response.outputs}


def write_model(folder: Path, name: str, config: str, files: Mapping[str, str | bytes] | None = None) -> Path:
    """A model's folder; `files` by path within it."""
    place = folder / name
    place.mkdir(parents=True)
    if config:
        (place / "config.pbtxt").write_text(config)
    for path, content in (files or {}).items():
        file = place / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content)
    return place


__all__ = ["Asked", "Served", "ServerError", "arrays", "write_model"]
