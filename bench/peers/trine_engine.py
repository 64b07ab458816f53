"""Trine, by its Python API, with its defaults; no prefix cache, for no prompt comes twice except to be checked."""

from __future__ import annotations

import math
from typing import Any

import trine
from trine import LLM, SamplingParams


class Engine:
    def __init__(self, settings: dict[str, Any]) -> None:
        self._llm = LLM(
            settings["model"],
            dtype=settings["dtype"],
            quantization=settings["quantization"],
            load_format=settings["load_format"],
            device=settings["device"],
            threads=settings["threads"],
            max_model_len=settings["max_len"],
            enable_prefix_caching=False,
        )
        self.version = trine.__version__
        self.device = self._llm.info.summary[0].removeprefix("device").strip()

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        return [output.outputs[0].token_ids for output in outputs]

    def finite(self, prompt: list[int], tokens: list[int]) -> dict[str, bool]:
        """Whether each token's log-probability is a number."""
        params = SamplingParams(temperature=0, max_tokens=len(tokens), ignore_eos=True, detokenize=False, logprobs=1)
        output = self._llm.generate([{"prompt_token_ids": prompt}], params)[0].outputs[0]
        assert output.logprobs is not None
        return {"finite": all(math.isfinite(entry.logprob) for step in output.logprobs for entry in step.values())}

    def gap(self, prompt: list[int], tokens: list[int]) -> dict[str, float]:
        """By how much the log-probabilities of two tokens after the prompt differ; 99 if one is not near the top."""
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, logprobs=20)
        output = self._llm.generate([{"prompt_token_ids": prompt}], params)[0].outputs[0]
        assert output.logprobs is not None
        seen = [output.logprobs[0].get(token) for token in tokens]
        if any(entry is None for entry in seen):
            return {"gap": 99.0}
        one, other = (entry.logprob for entry in seen if entry is not None)
        return {"gap": abs(one - other)}
