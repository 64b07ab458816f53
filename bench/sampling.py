"""Cost of choosing tokens: milliseconds a step by options, batch and vocabulary, beside plain PyTorch in the same run.

    python bench/sampling.py [--threads N] [--device cpu|cuda] [--json FILE]

The peer is what a straightforward sampler does: torch.argmax; softmax and torch.multinomial; a full sort for top-p.
Two kinds of logits: `peaked` falls off like a trained model's (the nucleus of 0.9 has tens of tokens), `flat` is what
random weights give (it has most of the vocabulary).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from trine.llm.sampling.params import SamplingParams
from trine.llm.sampling.sampler import Sampler

OPTIONS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_k 20, top_p 0.9": {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "top_p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "min_p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "greedy, penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    "greedy, logprobs 5": {"temperature": 0.0, "logprobs": 5},
}
PROMPT_TOKENS = 500


def make_logits(kind: str, rows: int, vocab: int, device: str) -> torch.Tensor:
    """[rows, vocab] float32."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((rows, vocab), generator=generator)
    if kind == "peaked":
        ranks = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(rows)])
        logits = logits - 1.6 * torch.log1p(ranks.float())
    return logits.to(device)


def peer(options: dict[str, float], logits: torch.Tensor) -> torch.Tensor:
    """The usual PyTorch way to sample with the same options, for those that it has."""
    if options["temperature"] == 0.0:
        return logits.argmax(-1)
    logits = logits / options["temperature"]
    if "top_k" in options:
        kth = torch.topk(logits, int(options["top_k"])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if "top_p" in options:
        ordered, places = logits.sort(descending=True)
        mass = ordered.softmax(-1).cumsum(-1)
        drop = torch.zeros_like(mass, dtype=torch.bool)
        drop[:, 1:] = mass[:, :-1] >= options["top_p"]
        logits = logits.masked_fill(drop.scatter(1, places, drop), -torch.inf)
    probabilities = logits.softmax(-1)
    if "min_p" in options:
        floor = options["min_p"] * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    return torch.multinomial(probabilities, 1)


def milliseconds(call: Callable[[], object], device: str, seconds: float) -> float:
    """Median time of a call over about `seconds`, after a warm-up."""
    times: list[float] = []
    call()
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def measure(kind: str, name: str, rows: int, vocab: int, device: str, seconds: float) -> dict[str, object]:
    options = OPTIONS[name]
    logits = make_logits(kind, rows, vocab, device)
    sampler = Sampler(rows, vocab, device)
    prompt = torch.randint(vocab, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    for row in range(rows):
        sampler.set_row(
            row,
            SamplingParams(**options),  # type: ignore[arg-type]
            prompt_token_ids=prompt,
            output_token_ids=[],
            eos_token_ids=[0],
            bad_words_token_ids=[],
            seed=row,
        )
    step = 0

    def ours() -> None:
        nonlocal step
        sampler.sample(logits, list(range(rows)), [step] * rows)
        step += 1

    record = {"logits": kind, "options": name, "rows": rows, "vocab": vocab}
    record["ms"] = milliseconds(ours, device, seconds)
    record["torch_ms"] = milliseconds(lambda: peer(options, logits), device, seconds)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=0, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--vocab", type=int, nargs="*", default=[4096, 151936])
    parser.add_argument("--seconds", type=float, default=0.15, help="time a measurement takes")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    records = []
    print(f"{'logits':8}{'options':22}{'vocab':>8}{'rows':>6}{'ms/step':>10}{'torch ms':>10}{'ratio':>8}")
    with torch.inference_mode():
        for vocab in arguments.vocab:
            for kind in ("peaked", "flat"):
                for name in OPTIONS:
                    if kind == "flat" and "p 0" not in name:
                        continue
                    for rows in arguments.rows:
                        record = measure(kind, name, rows, vocab, arguments.device, arguments.seconds)
                        records.append(record)
                        ratio = record["torch_ms"] / record["ms"]  # type: ignore[operator]
                        print(
                            f"{kind:8}{name:22}{vocab:8}{rows:6}{record['ms']:10.3f}{record['torch_ms']:10.3f}{ratio:8.1f}"
                        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(
                {"threads": torch.get_num_threads(), "device": arguments.device, "steps": records}, file, indent=1
            )


if __name__ == "__main__":
    main()
