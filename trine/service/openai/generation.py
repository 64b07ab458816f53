"""From sampling parameters to a running request and its accounts: what chat and plain completions share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from trine.core.errors import TrineError
from trine.llm.outputs import Delta, RequestOutput
from trine.service.openai.structs.base import PromptTokensDetails, Usage

if TYPE_CHECKING:
    from trine.llm.api import AsyncLLM, RequestStream
    from trine.llm.sampling.params import SamplingParams
    from trine.service.asgi import Request
    from trine.service.openai.context import Service

ResultT = TypeVar("ResultT")
_ENDED = {"stop": "stop", "length": "length"}


class Generation:
    """The running sequences of one HTTP request: one engine request a prompt.

    Whoever iterates over a stream has each wake-up counted by `account`. `close` cancels what has not finished, and is
    to be called in any case.
    """

    def __init__(self, service: Service, request: Request, num_sequences: int) -> None:
        self.streams: list[RequestStream] = []
        self.completion_tokens = [0] * num_sequences
        self.created = int(time.time())
        self.unfinished = num_sequences
        self._meter = service.meter(request.arrival)
        self._notes = request.notes

    def start(
        self,
        engine: AsyncLLM,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        priority: int | None,
        deadline: float | None,
    ) -> None:
        """Queue every prompt, or none: an error cancels those before it."""
        try:
            for token_ids in prompts:
                self.streams.append(
                    engine.stream({"prompt_token_ids": token_ids}, params, priority=priority or 0, deadline=deadline)
                )
        except TrineError:
            self.close()
            raise

    def close(self) -> None:
        for stream in self.streams:
            stream.cancel()
        self._notes["generated_tokens"] = sum(self.completion_tokens)
        if self.unfinished:
            self._meter.finish("abort", sum(self.completion_tokens))

    def account(self, deltas: list[Delta], first_choice: int) -> None:
        """Count what one wake-up brought, and number its deltas from `first_choice` on, over all prompts."""
        counts = self.completion_tokens
        if len(deltas) == 1:
            [delta] = deltas
            delta.index += first_choice
            total = len(delta.token_ids)
            counts[delta.index] += total
            self._meter.wake_up(total, 1)
        else:
            total, choices = 0, set()
            for delta in deltas:
                delta.index += first_choice
                counts[delta.index] += len(delta.token_ids)
                total += len(delta.token_ids)
                choices.add(delta.index)
            self._meter.wake_up(total, len(choices))
        for delta in deltas:
            if delta.finish_reason is not None:
                self._ended(delta)

    async def collect(self) -> list[RequestOutput]:
        """The whole results, one a prompt."""
        width = len(self.completion_tokens) // len(self.streams)

        async def one(number: int, stream: RequestStream) -> RequestOutput:
            def counted(deltas: list[Delta]) -> bool:
                self.account(deltas, number * width)
                return True

            stream.sink = counted
            async for deltas in stream:
                self.account(deltas, number * width)
            return stream.state.result()

        return await together([one(number, stream) for number, stream in enumerate(self.streams)])

    def _ended(self, delta: Delta) -> None:
        reason = delta.finish_reason or "error"
        self._meter.finish(reason, self.completion_tokens[delta.index])
        self._notes["finish_reason"] = reason
        if reason in _ENDED:  # the others end the whole request with an error
            self.unfinished -= 1
            if not self.unfinished:
                for stream in self.streams:
                    self._meter.prompt(len(stream.prompt_token_ids))
                self._meter.done()

    def usage(self) -> Usage:
        """Token counts so far, over all prompts and choices."""
        prompt = sum(len(stream.prompt_token_ids) for stream in self.streams)
        cached = sum(stream.num_cached_tokens for stream in self.streams)
        completion = sum(self.completion_tokens)
        self._notes["prompt_tokens"] = prompt
        self._notes["cached_tokens"] = cached
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )


async def together(coroutines: list[Coroutine[Any, Any, ResultT]]) -> list[ResultT]:
    """Results in order. The first failure cancels the others and is raised as it is."""
    if len(coroutines) == 1:
        return [await coroutines[0]]
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
