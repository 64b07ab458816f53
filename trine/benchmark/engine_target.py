"""An engine in this process as the target of a load."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from trine.benchmark.load import Answer

if TYPE_CHECKING:
    from trine.llm.api import AsyncLLM


class EngineTarget:
    """Greedy answers of exactly `output_len` tokens to prompts of `input_len` random tokens, each its own."""

    def __init__(self, engine: AsyncLLM, input_len: int, output_len: int, seed: int = 0) -> None:
        from trine.llm.sampling.params import SamplingParams

        self._engine = engine
        self._input_len = input_len
        self._seed = seed
        self._params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)

    async def stream(self, number: int, answer: Answer) -> AsyncIterator[int]:
        draw = random.Random(f"{self._seed}.{number}")
        vocab_size = self._engine.info.vocab_size
        token_ids = [draw.randrange(vocab_size) for _ in range(self._input_len)]
        stream = self._engine.stream({"prompt_token_ids": token_ids}, self._params)
        answer.prompt_tokens = self._input_len
        async for deltas in stream:
            tokens = sum(len(delta.token_ids) for delta in deltas)
            answer.output_tokens += tokens
            if tokens:
                yield tokens
