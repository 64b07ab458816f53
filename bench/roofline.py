"""What the machine allows: rates measured here and now, and the speed of a model that they bound.

A decode step reads every weight once, whatever the batch, and each sequence's keys and values; prefill multiplies by
every weight for each token. The bound is the slower of the two, memory or arithmetic; no engine can be faster.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_CPU_BYTES = 1 << 30
_GPU_BYTES = 4 << 30


@dataclass(frozen=True)
class Limits:
    """Bytes a second read and copied (read + written), and operations a second of a matrix product by dtype."""

    device: str
    read: float
    copy: float
    matrix: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_limits(threads: int) -> Limits:
    """On the GPU if there is one, else on the CPU with so many threads. Takes a few seconds."""
    if torch.cuda.is_available():
        return _measure("cuda", _GPU_BYTES, 8192, ("bfloat16", "float16"))
    torch.set_num_threads(threads)
    return _measure("cpu", _CPU_BYTES, 1536, ("float32", "bfloat16"))


def _measure(device: str, size: int, side: int, dtypes: tuple[str, ...]) -> Limits:
    data = torch.ones(size // 4, device=device)
    target = torch.empty_like(data)
    read = size / _seconds(device, torch.sum, data)
    copy = 2 * size / _seconds(device, target.copy_, data)
    del data, target
    matrix = {}
    for name in dtypes:
        a, b = (torch.randn(side, side, device=device).to(getattr(torch, name)) for _ in range(2))
        matrix[name] = 2 * side**3 / _seconds(device, torch.matmul, a, b)
    if device == "cpu":
        # Where the processor has no instructions for bfloat16, its product is slower than float32's.
        matrix["bfloat16"] = max(matrix.values())
    elif torch.cuda.get_device_capability() >= (8, 9):
        matrix["fp8"] = _fp8_rate(side)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return Limits(name, max(read, copy / 2) if device == "cpu" else max(read, copy), copy, matrix)


def _fp8_rate(side: int) -> float:
    a, b = (torch.randn(side, side, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    scaled = partial(torch._scaled_mm, out_dtype=torch.bfloat16)
    return 2 * side**3 / _seconds("cuda", scaled, a, b.t(), one, one)


def _seconds(device: str, action: Callable[..., object], *arguments: torch.Tensor) -> float:
    """Median time of an action, after two that warm up."""
    times = []
    for turn in range(9):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        action(*arguments)
        if device == "cuda":
            torch.cuda.synchronize()
        if turn >= 2:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def describe(limits: Limits) -> str:
    products = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in limits.matrix.items())
    memory = f"read {limits.read / 1e9:.4g} GB/s, copy {limits.copy / 1e9:.4g} GB/s"
    return f"{limits.device}: {memory}; products {products} TFLOP/s"


def weights(config: dict[str, Any], rows: int) -> tuple[float, float]:
    """Weights that a step of `rows` tokens touches, and weights that one token is multiplied by.

    They differ for a mixture of experts: rows choose k of E experts each, so E (1 - (1 - k/E)^rows) are touched.
    """
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    head = hidden * config["vocab_size"]
    experts = config.get("num_experts")
    if not experts:
        dense = layers * (attention + 3 * hidden * config["intermediate_size"]) + head
        return dense, dense
    chosen, expert = config["num_experts_per_tok"], 3 * hidden * config["moe_intermediate_size"]
    touched = experts * (1 - (1 - chosen / experts) ** rows)
    rest = layers * (attention + hidden * experts) + head
    return rest + layers * touched * expert, rest + layers * chosen * expert


def bound(
    config: dict[str, Any], limits: Limits, shape: tuple[int, int, int], dtype: str, quantization: str | None
) -> dict[str, float]:
    """The highest rates, in tokens a second of all requests together, that the limits allow on a workload."""
    requests, prompt_len, output_len = shape
    size = _DTYPE_BYTES[dtype]
    weight_size = 1 if quantization else size
    rate = limits.matrix.get("fp8" if quantization == "fp8" else dtype) or max(limits.matrix.values())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    cache = 2 * config["num_hidden_layers"] * kv_heads * head_dim * size
    touched, multiplied = weights(config, requests)
    context = prompt_len + output_len / 2
    memory = (touched * weight_size + requests * context * cache) / limits.read
    decode = requests / max(memory, 2 * multiplied * requests / rate)
    head = config["hidden_size"] * config["vocab_size"]  # prefill needs logits of one token a prompt only
    attention = 2 * config["num_hidden_layers"] * config["num_attention_heads"] * head_dim * prompt_len
    prefill = rate / (2 * (multiplied - head) + attention)
    seconds = requests * (prompt_len / prefill + (output_len - 1) / decode)
    return {
        "prefill_tok_s": prefill,
        "decode_tok_s": decode,
        "output_tok_s": requests * output_len / seconds,
        "total_tok_s": requests * (prompt_len + output_len) / seconds,
    }
