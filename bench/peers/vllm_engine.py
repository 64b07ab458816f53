"""vLLM, by its offline API, without a prefix cache."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    # Left to itself it binds all its threads to one of two cores.
    cpus = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"{cpus[0]}-{cpus[-1]}")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import vllm


class Engine:
    def __init__(self, settings: dict[str, Any]) -> None:
        cuda = torch.cuda.is_available()
        options: dict[str, Any] = {}
        if settings["quantization"] == "fp8":
            options["quantization"] = "fp8"
        elif settings["quantization"]:
            raise RuntimeError(f"no {settings['quantization']} weights here")
        if cuda:
            options |= {"max_num_batched_tokens": 8192, "gpu_memory_utilization": settings["memory_share"]}
        self.version = vllm.__version__
        self.device = torch.cuda.get_device_name() if cuda else f"CPU, {settings['threads']} threads"
        self._llm = vllm.LLM(
            settings["model"],
            load_format=settings["load_format"],
            skip_tokenizer_init=True,
            dtype=settings["dtype"],
            max_model_len=settings["max_len"],
            max_num_seqs=min(256, settings["max_requests"]),
            enable_prefix_caching=False,
            **options,
        )

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        params = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        outputs = self._llm.generate([{"prompt_token_ids": own} for own in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def timeline(self, requests: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
        """When each token of each request came, in seconds from the start; requests come at their `at`."""
        engine = self._llm.llm_engine
        times: list[list[float]] = [[] for _ in requests]
        waiting = sorted(range(len(requests)), key=lambda index: requests[index]["at"])
        started = time.perf_counter()
        while waiting or engine.has_unfinished_requests():
            while waiting and requests[waiting[0]]["at"] <= time.perf_counter() - started:
                index = waiting.pop(0)
                own = requests[index]
                params = vllm.SamplingParams(temperature=0, max_tokens=own["new"], ignore_eos=True, detokenize=False)
                engine.add_request(str(index), {"prompt_token_ids": own["prompt"]}, params)
            outputs = engine.step() if engine.has_unfinished_requests() else []
            now = time.perf_counter() - started
            for output in outputs:
                own_times = times[int(output.request_id.split("-")[0])]
                own_times += [now] * (len(output.outputs[0].token_ids) - len(own_times))
        return {"times": times}
