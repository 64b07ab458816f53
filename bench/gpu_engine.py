"""The GPU check's upper half: the engine against Transformers, tokens a second, where a step's time goes."""

from __future__ import annotations

import gc
import json
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from gpu_report import Report

from trine import LLM, SamplingParams
from trine.llm.graphs import StepGraphs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def without_graphs() -> Iterator[None]:
    kept = StepGraphs.size
    StepGraphs.size = lambda *args, **options: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        StepGraphs.size = kept  # type: ignore[method-assign]


def small_checkpoints(folder: Path) -> Iterator[tuple[str, Path, Any]]:
    """Random checkpoints of each family, with large weights so that greedy output does not loop."""
    import transformers

    common = {"vocab_size": 500, "hidden_size": 128, "num_hidden_layers": 3, "initializer_range": 0.2,
              "bos_token_id": None, "eos_token_id": None}  # fmt: skip
    rotary = common | {"intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
                       "max_position_embeddings": 1024}  # fmt: skip
    configs = {
        "llama": transformers.LlamaConfig(**rotary),
        "mistral": transformers.MistralConfig(**rotary, sliding_window=50),
        "qwen2": transformers.Qwen2Config(**rotary),
        "qwen3": transformers.Qwen3Config(**rotary, head_dim=64),
        "qwen3_moe": transformers.Qwen3MoeConfig(
            **rotary, head_dim=64, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=96, norm_topk_prob=True
        ),
        "mixtral": transformers.MixtralConfig(**rotary, num_local_experts=6, num_experts_per_tok=2),
        "gpt2": transformers.GPT2Config(
            vocab_size=500, n_embd=128, n_layer=3, n_head=4, n_positions=1024, initializer_range=0.2,
            bos_token_id=None, eos_token_id=None,
        ),
    }  # fmt: skip
    for name, config in configs.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        model.save_pretrained(folder / name)
        yield name, folder / name, model.to(DEVICE)


@torch.no_grad()
def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt], device=DEVICE)
    out = model(ids, use_cache=True)
    tokens = [int(out.logits[0, -1].argmax())]
    while len(tokens) < count:
        out = model(torch.tensor([[tokens[-1]]], device=DEVICE), past_key_values=out.past_key_values, use_cache=True)
        tokens.append(int(out.logits[0, -1].argmax()))
    return tokens


def check_engine(report: Report, count: int = 48) -> None:
    chooser = random.Random(1)
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    prompts = [[chooser.randrange(500) for _ in range(n)] for n in (1, 5, 17, 40, 64, 100, 130, 7, 300, 33)]
    with tempfile.TemporaryDirectory() as folder:
        for name, directory, model in small_checkpoints(Path(folder)):
            expected = [greedy(model, prompt, count) for prompt in prompts]
            inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
            options = {"dtype": "float32", "max_num_seqs": 16, "cache_bytes": 1 << 28}
            runs = {}
            for run, budget, context in (
                ("graphs", 96, nullcontext),
                ("graphs, whole prompts", 1024, nullcontext),
                ("launched", 96, without_graphs),
            ):
                with LLM(str(directory), max_num_batched_tokens=budget, **options) as llm, context():
                    runs[run] = llm.generate(inputs, params)
            tokens = {key: [list(out.outputs[0].token_ids) for out in outs] for key, outs in runs.items()}
            equal = sum(a == b for a, b in zip(tokens["graphs"], expected, strict=True))
            same = tokens["graphs"] == tokens["graphs, whole prompts"] == tokens["launched"]
            report.show("engine", name, equal_to_transformers=f"{equal}/{len(prompts)}", graphs_change_nothing=same)
            if equal < len(prompts) or not same:
                report.fail(f"engine {name}: tokens differ")


@torch.no_grad()
def check_long(report: Report, requests: int = 64, count: int = 1024) -> None:
    """A trained model's greedy answers in bfloat16, token by token what a loop over Transformers' would choose: its
    logits for our answers show where it would part. There both tokens must be as good as tied.
    """
    import transformers

    from trine.evaluation import TASKS, make_items
    from trine.llm.loading import resolve_model

    directory = str(resolve_model("tiny"))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to(DEVICE).eval()
    head = model.get_output_embeddings().weight.float()
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    each = -(-requests // len(TASKS))
    items = [item for task in TASKS for item in make_items(task, 0, each, "heldout", lambda texts: [*map(len, texts)])]
    with LLM("tiny", dtype="bfloat16") as llm:
        room = llm.max_model_len - count
        prompts = [llm.tokenizer.render_chat(list(item.messages)) for item in items]
        prompts = [prompt for prompt in prompts if len(llm.tokenizer.encode(prompt)) < room][:requests]
        for name, batch in (("alone", prompts[:4]), ("together", prompts)):
            groups = [[prompt] for prompt in batch] if name == "alone" else [batch]
            gaps = []
            for output in (output for group in groups for output in llm.generate(group, params)):
                answer = list(output.outputs[0].token_ids)
                ids = torch.tensor([output.prompt_token_ids + answer], device=DEVICE)
                logits = model.model(ids).last_hidden_state[0, -count - 1 : -1].float() @ head.T
                chosen = torch.tensor(answer, device=DEVICE)
                parted = (logits.argmax(1) != chosen).nonzero()
                if len(parted):
                    first = logits[parted[0, 0]]
                    gaps.append(float(first.max() - first[answer[int(parted[0, 0])]]))
            equal = f"{len(batch) - len(gaps)}/{len(batch)}"
            worst = max(gaps, default=0.0)
            report.show("long", name, tokens=count, equal_to_transformers=equal, largest_first_gap=worst)
            if worst > TIE:
                report.fail(f"long {name}: a token differs with a gap of {worst:.3f} between the logits")


TIE = 0.5  # between logits of some 20, which bfloat16 by itself rounds by 0.06, after eight layers that round too


SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
        "hidden_act": "silu", "torch_dtype": "bfloat16", "eos_token_id": 151645,
    },
    "Llama-3.1-8B": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": False,
        "hidden_act": "silu", "torch_dtype": "bfloat16", "eos_token_id": 128001,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16",
        "eos_token_id": 151645,
    },
}  # fmt: skip
WORKLOADS = {  # requests, tokens in, tokens out
    "single": (1, 128, 256),
    "batch16": (16, 128, 256),
    "decode": (256, 128, 512),
    "mixed": (512, 1024, 256),
    "prefill": (64, 4096, 1),
}


@contextmanager
def loaded(report: Report, shape: str, **options: Any) -> Iterator[Any]:
    gc.collect()  # engines before this one
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        start = time.perf_counter()
        with LLM(
            folder,
            load_format="dummy",
            max_model_len=8192,
            enable_prefix_caching=False,
            cache_bytes=60 << 30,
            **options,
        ) as llm:
            report.show("speed", f"{shape} start", seconds=time.perf_counter() - start)
            llm.generate({"prompt_token_ids": [1] * 100}, SamplingParams(temperature=0, max_tokens=1))
            report.show("speed", f"{shape} start to first token", seconds=time.perf_counter() - start)
            yield llm


def measure_speed(report: Report, shape: str, profiled: bool) -> None:
    with loaded(report, shape) as llm:
        for name, (requests, length, count) in WORKLOADS.items():
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            chooser = random.Random(2)
            prompts = [
                {"prompt_token_ids": [chooser.randrange(1000, 100000) for _ in range(length)]} for _ in range(requests)
            ]
            warm = [{"prompt_token_ids": prompt["prompt_token_ids"][:17]} for prompt in prompts]
            llm.generate(warm, SamplingParams(temperature=0, max_tokens=min(count, 16), ignore_eos=True))
            start = time.perf_counter()
            llm.generate(prompts, params)
            elapsed = time.perf_counter() - start
            report.show("speed", f"{shape} {name}", output_tok_s=requests * count / elapsed,
                 total_tok_s=requests * (length + count) / elapsed)  # fmt: skip
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        for lengths in ((32,), (24, 40, 64, 128)):  # in all sizes of graphs: with padding other products would run
            own = [{"prompt_token_ids": list(range(1000, 1000 + length))} for length in lengths]
            replayed = [out.outputs[0].token_ids for out in llm.generate(own, params)]
            with without_graphs():
                same = replayed == [out.outputs[0].token_ids for out in llm.generate(own, params)]
            report.show("speed", f"{shape} {len(own)} sequences", graphs_change_nothing=same)
            if not same:
                report.fail(f"{shape}: tokens with and without graphs differ")
        if profiled:
            profile(report, llm, shape)


def profile(report: Report, llm: Any, shape: str) -> None:
    """Share of 30 decode steps that the GPU works, and the kernels that take it."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    for rows in (1, 64):
        params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
        prompts = [{"prompt_token_ids": [7 + row] * 16} for row in range(rows)]
        llm.generate(prompts, params)
        with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            llm.generate(prompts, params)
        launched = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        times: dict[str, list[float]] = {}
        for event in launched:
            times.setdefault(event.name, []).append(event.time_range.end - event.time_range.start)
        busy = sum(map(sum, times.values()))
        span = max(e.time_range.end for e in launched) - min(e.time_range.start for e in launched)
        report.show("profile", f"{shape} {rows} rows", span_us=float(span), busy=busy / span, kernels=len(launched))
        for name, each in sorted(times.items(), key=lambda item: -sum(item[1]))[:10]:
            print(f"            {sum(each) / busy:6.1%} {len(each):6} x {sum(each) / len(each):8.1f} us  {name[:90]}")
