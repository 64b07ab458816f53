"""A real server, and OpenAI's unmodified client in front of it, synchronous or asynchronous."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import openai

MODEL = "tiny"
READY_SECONDS = 180


class Server:
    """`trine serve` as a user starts it; `output` is what it printed so far."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "trine", "serve", *arguments, "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.output: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(READY_SECONDS), "".join(self.output)
        found = re.search(r"http://127\.0\.0\.1:\d+", "".join(self.output))
        assert found is not None, "".join(self.output)
        self.url = found[0]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            if line.startswith("print("):  # the last line of the snippet
                self._ready.set()
        self._ready.set()

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


class Api:
    """The synchronous and the asynchronous client behind one face: `call(lambda client: client.chat…create(…))`."""

    def __init__(self, kind: str, url: str, **options: Any) -> None:
        self.kind = kind
        self._loop = asyncio.new_event_loop()
        make: Any = openai.OpenAI if kind == "sync" else openai.AsyncOpenAI
        self.client = make(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60, **options)

    def call(self, make: Callable[[Any], Any]) -> Any:
        """The result of one call."""
        result = make(self.client)
        return result if self.kind == "sync" else self._loop.run_until_complete(result)

    def events(self, make: Callable[[Any], Any]) -> list[Any]:
        """Every event of a call with stream=True."""
        stream = self.call(make)
        if self.kind == "sync":
            return list(stream)

        async def collect() -> list[Any]:
            return [event async for event in stream]

        return self._loop.run_until_complete(collect())

    def helper(self, make: Callable[[Any], Any]) -> tuple[list[Any], Any]:
        """The events and the final completion of the client's `.stream(…)` helper."""
        if self.kind == "sync":
            with make(self.client) as stream:
                return list(stream), stream.get_final_completion()

        async def collect() -> tuple[list[Any], Any]:
            async with make(self.client) as stream:
                return [event async for event in stream], await stream.get_final_completion()

        return self._loop.run_until_complete(collect())

    def chat(self, content: str | None = "What is 12 + 30?", **fields: Any) -> Any:
        """A chat completion, greedy unless told otherwise."""
        return self.call(lambda client: client.chat.completions.create(**chat_fields(content, fields)))

    def chat_events(self, content: str | None = "What is 12 + 30?", **fields: Any) -> list[Any]:
        """The chunks of a streamed chat completion."""
        fields = chat_fields(content, {"stream": True, **fields})
        return self.events(lambda client: client.chat.completions.create(**fields))

    def complete(self, prompt: Any = "Once upon a time", **fields: Any) -> Any:
        """A plain completion, greedy unless told otherwise."""
        fields = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 8, **fields}
        return self.call(lambda client: client.completions.create(**fields))

    def complete_events(self, prompt: Any = "Once upon a time", **fields: Any) -> list[Any]:
        """The chunks of a streamed plain completion."""
        fields = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 8, "stream": True, **fields}
        return self.events(lambda client: client.completions.create(**fields))

    def close(self) -> None:
        self.call(lambda client: client.close())
        self._loop.close()


def chat_fields(content: str | None, fields: dict[str, Any]) -> dict[str, Any]:
    messages = {} if content is None else {"messages": [{"role": "user", "content": content}]}
    return {"model": MODEL, "temperature": 0, "max_tokens": 32, **messages, **fields}


def text_of(chunks: list[Any], index: int = 0) -> str:
    """The content of one choice of a chat stream."""
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices if choice.index == index)
