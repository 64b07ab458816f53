"""Hugging Face Transformers: `generate` on a padded batch (here all prompts are of one length)."""

from __future__ import annotations

from typing import Any

import torch
import transformers


class Engine:
    def __init__(self, settings: dict[str, Any]) -> None:
        if settings["quantization"]:
            raise RuntimeError(f"no {settings['quantization']} weights on this device without further packages")
        torch.set_num_threads(settings["threads"])
        cuda = settings["device"] != "cpu" and torch.cuda.is_available()
        self.device = torch.cuda.get_device_name() if cuda else f"CPU, {settings['threads']} threads"
        self.version = transformers.__version__
        model = transformers.AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype=getattr(torch, settings["dtype"])
        )
        self._model = model.to("cuda" if cuda else "cpu").eval()
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=self._model.device)
        mask = torch.ones_like(ids)
        out = self._model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return out[:, ids.shape[1] :].tolist()
