"""Options become an engine: model, limits, cache, executor."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from trine.core.errors import ConfigurationError, ModelLoadError
from trine.core.sizes import format_bytes
from trine.kernels import fp8, ops
from trine.llm.cache.blocks import BlockPool
from trine.llm.client import EngineInfo
from trine.llm.config import DTYPES, ModelConfig
from trine.llm.engine import EngineCore, Executor
from trine.llm.loading import load_model, resolve_model
from trine.llm.memory import CachePlan, activation_bytes, available_bytes, check_weights_fit, plan_cache
from trine.llm.options import EngineOptions, available_cpus
from trine.llm.scheduler import Scheduler, SchedulerLimits
from trine.llm.worker import InlineExecutor, ThreadExecutor, Worker

logger = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            "device=cuda, but torch sees no NVIDIA GPU: check nvidia-smi and that torch is a CUDA build", param="device"
        )
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def build_engine(options: EngineOptions) -> tuple[EngineCore, EngineInfo]:
    """Load the model and size everything; TrineErrors say what does not fit or is not there."""
    started = time.perf_counter()
    device = choose_device(options.device)
    if device.type == "cuda":
        threading.Thread(target=_prepare_compiler).start()
    threads = options.threads or available_cpus()
    ops.set_num_threads(threads)
    directory = resolve_model(options.model)
    config = ModelConfig.from_directory(directory)
    if options.load_format == "auto":
        rounded = options.quantization is not None and "quantization_config" not in config.hf
        # 8 bits a weight of a linear layer, and a tenth for what is not rounded
        check_weights_fit(directory, device, 1.1 / config.dtype.itemsize if rounded else 1.0)
    dtype = config.dtype if options.dtype == "auto" else DTYPES[options.dtype]
    max_model_len = _context(options, config)
    refusals = ops.attention_refusals(device.type, config.num_heads, config.num_kv_heads, config.head_dim, dtype)
    if refusals:
        raise ModelLoadError(
            f"this model's attention can't run on {device.type}: {'; '.join(refusals)}; use --device cpu"
        )
    max_num_seqs = options.max_num_seqs or (256 if device.type == "cuda" else 128)
    max_tokens = options.max_num_batched_tokens or (8192 if device.type == "cuda" else 512)
    max_tokens = max(max_tokens, max_num_seqs)
    block_size = options.block_size or (64 if device.type == "cuda" else 16)
    load = partial(
        load_model,
        directory,
        dtype=dtype,
        device=device,
        quantization=options.quantization,
        cache_dtype=fp8.DTYPE if options.cache_dtype == "fp8" else None,
        max_model_len=max_model_len,
    )
    limits = SchedulerLimits(max_num_seqs, max_tokens, block_size, max_model_len, options.enable_prefix_caching)
    with ExitStack() as failing:
        compilations = None
        if device.type == "cuda":
            from trine.llm.rehearsal import compile_kernels

            compilations = compile_kernels(
                lambda short: load(config=short, load_format="dummy")[0], config, device, limits
            )
            for compilation in compilations:
                failing.callback(compilation.close)
        model, _ = load(config=config, load_format=options.load_format)
        loaded = time.perf_counter()
        plan = plan_cache(
            model.cache_specs(),
            device=device,
            block_size=block_size,
            max_model_len=max_model_len,
            max_model_len_given=options.max_model_len is not None,
            max_num_seqs=max_num_seqs,
            cache_bytes=options.cache_bytes,
            reserved_bytes=activation_bytes(
                max_tokens, max_num_seqs, config.hidden_size, config.intermediate_size, config.vocab_size
            ),
        )
        limits = replace(limits, max_model_len=plan.max_model_len)
        worker = Worker(
            model,
            vocab_size=config.vocab_size,
            device=device,
            limits=limits,
            num_blocks=plan.num_blocks,
            eos_token_ids=config.eos_token_ids,
        )
        if compilations is not None:
            waiting = time.perf_counter()
            needed, worker.compilation = compilations
            needed.wait()
            logger.info("waited %.1f s for the first kernels", time.perf_counter() - waiting)
        failing.pop_all()
    inline = device.type == "cuda" or not options.async_loop
    executor: Executor = InlineExecutor(worker) if inline else ThreadExecutor(worker)
    core = EngineCore(
        Scheduler(limits, BlockPool(plan.num_blocks), config.eos_token_ids),
        executor,
        vocab_size=config.vocab_size,
        async_loop=options.async_loop,
        grammars=lambda: _grammar_compiler(options, directory),
    )
    summary = _summary(device, threads, dtype, options, plan, limits, loaded - started, time.perf_counter() - started)
    info = EngineInfo(
        model_name=options.model if not os.path.isdir(options.model) else directory.resolve().name,
        vocab_size=config.vocab_size,
        max_model_len=plan.max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        num_blocks=plan.num_blocks,
        block_size=block_size,
        eos_token_ids=config.eos_token_ids,
        sampling_defaults=config.sampling_defaults,
        summary=summary,
    )
    if device.type == "cuda":
        gc.collect()
        gc.freeze()  # to go through all that loading made takes 0.1 s, in which the GPU would run dry
    return core, info


def _prepare_compiler() -> None:
    from trine.kernels.triton.compile_ahead import prepare

    with suppress(Exception):  # whoever compiles says it
        prepare()


def _context(options: EngineOptions, config: ModelConfig) -> int:
    if options.max_model_len is not None and options.max_model_len > config.max_model_len:
        raise ConfigurationError(
            f"max_model_len={options.max_model_len} is more than the {config.max_model_len} tokens that this model's "
            "positions allow (config.json): lower it",
            param="max_model_len",
        )
    return options.max_model_len or config.max_model_len


def _grammar_compiler(options: EngineOptions, directory: Path):  # type: ignore[no-untyped-def]
    from trine.llm.sampling.grammar import GrammarCompiler
    from trine.llm.tokenizer import Tokenizer

    return GrammarCompiler(Tokenizer.from_directory(options.tokenizer or directory))


def _summary(
    device: torch.device,
    threads: int,
    dtype: torch.dtype,
    options: EngineOptions,
    plan: CachePlan,
    limits: SchedulerLimits,
    load_seconds: float,
    total_seconds: float,
) -> tuple[str, ...]:
    place = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads} threads, {ops.cpu_kernels()}"
    )
    precision = str(dtype).removeprefix("torch.") + (
        f", {options.quantization} weights" if options.quantization else ""
    )
    precision += ", fp8 cache" if options.cache_dtype == "fp8" else ""
    tokens = (plan.num_blocks - 1) * limits.block_size
    return (
        f"device    {place}; {precision}",
        f"cache     {format_bytes(plan.total_bytes)}: {plan.num_blocks} blocks of {limits.block_size} tokens "
        f"({format_bytes(plan.block_bytes)}), {tokens:,} tokens; {format_bytes(max(0, available_bytes(device)))} left",
        f"limits    {limits.max_num_seqs} sequences at once, {limits.max_num_batched_tokens} tokens a step, "
        f"{plan.max_model_len} tokens of context",
        f"started   in {total_seconds:.1f} s ({load_seconds:.1f} s for the weights)",
    )
