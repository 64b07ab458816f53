"""Finds the kernels that an engine on a GPU will launch before its model is loaded, so that both happen at once.

Kernels are compiled for types, alignments and a few sizes of what they get, and the layers of a model are alike. A
model of two of them, with random weights, launches what the whole one does.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import torch

from trine.kernels.triton.compile_ahead import Compilation
from trine.kernels.triton.launch import Recorder, recording
from trine.llm.config import ModelConfig
from trine.llm.models.base import CausalLM
from trine.llm.options import available_cpus
from trine.llm.scheduler import SchedulerLimits
from trine.llm.worker import Worker


def shortened(config: ModelConfig) -> ModelConfig:
    """The same model with no more of its layers than show every kind of layer, first and in between."""
    dense = config.experts.dense_layers if config.experts is not None else frozenset()
    kinds = [(window, layer in dense) for layer, window in enumerate(config.layer_windows)]
    count = min(max(kinds.index(kind) for kind in kinds) + 2, config.num_layers)
    return replace(config, num_layers=count, layer_windows=config.layer_windows[:count])


def compile_kernels(
    load: Callable[[ModelConfig], CausalLM], config: ModelConfig, device: torch.device, limits: SchedulerLimits
) -> tuple[Compilation, Compilation]:
    """Begin to compile what steps within `limits` will launch, or to load what the disk has of it: what a short prompt
    and its decodes need, and everything else behind it. `load` makes a model with random weights.
    """
    recorder, processes = Recorder(), available_cpus()
    worker = Worker(
        load(shortened(config)),
        vocab_size=config.vocab_size,
        device=device,
        limits=limits,
        num_blocks=2,
        eos_token_ids=(),
    )
    with recording(recorder):
        worker.rehearse(first=True)
    needed = list(recorder.variants.values())
    first = Compilation(needed, processes)
    try:
        with recording(recorder):
            worker.rehearse(first=False)
        rest = Compilation(list(recorder.variants.values())[len(needed) :], processes, background=True)
    except BaseException:
        first.start()
        first.close()
        raise
    first.start()  # not before, as a process with fewer threads is forked more safely
    rest.start(after=first)
    del worker
    gc.collect()  # modules and graphs refer to each other in circles
    torch.cuda.empty_cache()
    return first, rest
