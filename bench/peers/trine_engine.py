"""Trine, by its Python API, with its defaults; no prefix cache, for no prompt comes twice except to be checked."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

import trine
from trine import LLM, SamplingParams


class Engine:
    def __init__(self, settings: dict[str, Any]) -> None:
        memory: dict[str, int] = {}
        if torch.cuda.is_available() and settings["memory_share"] < 0.5:  # another engine needs as much
            memory["cache_bytes"] = int(0.3 * torch.cuda.mem_get_info()[1])
        self._llm = LLM(
            settings["model"],
            dtype=settings["dtype"],
            quantization=settings["quantization"],
            load_format=settings["load_format"],
            device=settings["device"],
            threads=settings["threads"],
            max_model_len=settings["max_len"],
            enable_prefix_caching=False,
            **memory,
        )
        self.version = trine.__version__
        self.device = self._llm.info.summary[0].removeprefix("device").strip()

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        return [output.outputs[0].token_ids for output in outputs]

    def timeline(self, requests: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
        """When each token of each request came, in seconds from the start; requests come at their `at`."""
        core, processor = self._llm._core, self._llm._processor
        times: list[list[float]] = [[] for _ in requests]
        request_of: dict[int, int] = {}
        waiting = sorted(range(len(requests)), key=lambda index: requests[index]["at"])
        started = time.perf_counter()
        while waiting or core.has_work:
            while waiting and requests[waiting[0]]["at"] <= time.perf_counter() - started:
                index = waiting.pop(0)
                own = requests[index]
                params = SamplingParams(temperature=0, max_tokens=own["new"], ignore_eos=True, detokenize=False)
                _, sequences = processor.start({"prompt_token_ids": own["prompt"]}, params)
                for sequence in sequences:
                    request_of[sequence.id] = index
                    core.add(sequence)
            outputs = core.step().outputs if core.has_work else []
            now = time.perf_counter() - started
            for output in outputs:
                times[request_of[output.id]] += [now] * len(output.token_ids)
            processor.process(outputs)
        return {"times": times}

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
