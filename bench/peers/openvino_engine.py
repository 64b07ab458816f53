"""OpenVINO GenAI's pipeline on a model that optimum-intel exported."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
import openvino_genai

_PRECISION = {"float32": ("f32", "FP32"), "bfloat16": ("bf16", "BF16"), "float16": ("f16", "FP16")}
"""OpenVINO's names: of the hint, and of the capability."""


class Engine:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.version = openvino_genai.__version__
        options = {"INFERENCE_NUM_THREADS": settings["threads"]}
        capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        hint, capability = _PRECISION[settings["dtype"]]
        used = hint if capability in capabilities else "f32"
        options["INFERENCE_PRECISION_HINT"] = used
        self.device = f"CPU, {settings['threads']} threads, computes in {used}"
        self._pipeline = openvino_genai.LLMPipeline(settings["openvino"], "CPU", **options)

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        config = openvino_genai.GenerationConfig(
            max_new_tokens=new, min_new_tokens=new, ignore_eos=True, do_sample=False
        )
        ids = np.array(prompts, np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        return [list(tokens) for tokens in self._pipeline.generate(inputs, config).tokens]
