"""Arguments that several subcommands share, and what they mean to the engine."""

from __future__ import annotations

import argparse
from typing import Any

from trine.core.errors import ConfigurationError
from trine.core.sizes import parse_size

MODEL_HELP = (
    "a directory with a Hugging Face checkpoint, a name on the hub (org/name), or tiny, the model in the package"
)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Everything has a default that suits the model and the machine."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights and activations (auto: the checkpoint's)",
    )
    group.add_argument(
        "--quantization",
        choices=("int8", "fp8"),
        help="store the weights in fewer bits: int8 on a CPU, fp8 on a GPU (activations too)",
    )
    group.add_argument(
        "--cache-dtype",
        choices=("auto", "fp8"),
        help="of keys and values; fp8 holds twice the tokens of bfloat16 (default: as the activations)",
    )
    group.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: the GPU if there is one"
    )
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads that compute (default: one a core)")
    group.add_argument(
        "--max-model-len",
        type=positive,
        metavar="N",
        help="tokens of prompt and answer together (default: what the model was made for, if the memory allows)",
    )
    group.add_argument("--max-num-seqs", type=positive, metavar="N", help="sequences computed at once")
    group.add_argument(
        "--max-num-batched-tokens",
        type=positive,
        metavar="N",
        help="tokens computed in one step; less means smoother streams, more means faster prompts",
    )
    group.add_argument(
        "--cache-memory",
        type=size,
        metavar="SIZE",
        help="memory for keys and values, for example 4GiB (default: from what is free)",
    )
    group.add_argument(
        "--no-prefix-caching", action="store_true", help="compute shared beginnings of prompts anew each time"
    )
    group.add_argument(
        "--load-format",
        default="auto",
        choices=("auto", "dummy"),
        help="dummy: random weights from config.json alone, to measure speed",
    )
    group.add_argument("--seed", type=int, metavar="N", help="makes requests without a seed of their own repeatable")


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `LLM` and `AsyncLLM`; what was not given is left to them."""
    options: dict[str, Any] = {
        "dtype": args.dtype,
        "device": args.device,
        "load_format": args.load_format,
        "enable_prefix_caching": not args.no_prefix_caching,
        "quantization": args.quantization,
        "cache_dtype": args.cache_dtype,
        "threads": args.threads,
        "max_model_len": args.max_model_len,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "cache_bytes": args.cache_memory,
        "seed": args.seed,
    }
    return {name: value for name, value in options.items() if value is not None}


def add_sampling_options(parser: argparse.ArgumentParser, *, temperature: float) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", type=positive, metavar="N", help="longest answer (default: as long as the context allows)"
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help=f"0 always takes the most probable token (default: {temperature:g})",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the smallest set of tokens with this probability",
    )
    group.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from the K most probable tokens (0: all)"
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; may be repeated"
    )


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `SamplingParams`."""
    return {
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "stop": tuple(args.stop),
        "seed": args.seed,
    }


def positive(text: str) -> int:
    """An integer from 1 on, as argparse wants it."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small: give 1 or more")
    return value


def positive_list(text: str) -> list[int]:
    """Integers from 1 on, with commas between them."""
    return [positive(part) for part in text.split(",")]


def size(text: str) -> int:
    """Bytes, as argparse wants it."""
    try:
        return parse_size(text)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(error.message) from error
