"""Train `tiny` and write its checkpoint.

    python -m models.tiny.train --data build/tiny --model trine/data/tiny --output trine/data/tiny --minutes 7.4

The data comes from prose.py and tokenizer.py; tasks and conversations are generated while training. The
9,000 steps take eight minutes on one H200; `--minutes` ends them (learning rate and curriculum included) at a time
limit, `--save FILE` and `--resume FILE` carry the whole state over from one run to the next.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from models.tiny.data import CATEGORIES, Batches
from models.tiny.model import Shape, Tiny, block_mask, dense_mask
from models.tiny.optimizer import make_optimizers

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
WARM_UP = 150
DECAY_FROM = 0.45
FINAL = 0.02
CLIP = 1.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="prose.npy and definitions.json")
    parser.add_argument("--model", type=Path, required=True, help="the model's directory: its tokenizer files")
    parser.add_argument("--output", type=Path, required=True, help="where the checkpoint is written")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--stop-after", type=int, help="end this run after so many steps, before the schedule ends")
    parser.add_argument("--minutes", type=float, help="shorten the schedule to this time")
    parser.add_argument("--rows", type=int, default=32, help="rows a step")
    parser.add_argument("--length", type=int, default=4096, help="tokens a row")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--save", type=Path, help="write the training state here at the end")
    parser.add_argument("--resume", type=Path, help="go on from this training state")
    return parser.parse_args()


def learning_rate(step: int, progress: float) -> float:
    """Share of the peak: warm up, hold, fall linearly."""
    fall = 1.0 if progress < DECAY_FROM else FINAL + (1 - FINAL) * (1 - progress) / (1 - DECAY_FROM)
    return min(1.0, (step + 1) / WARM_UP) * fall


def losses_of(model: Tiny, batch: Tensor, mask: object) -> tuple[Tensor, Tensor]:
    """Weighted mean loss over a batch [R, 4, L], and the loss sums and weights by category [2, categories]."""
    tokens, weights, documents, categories = batch.unbind(1)
    with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=batch.is_cuda):
        logits = model(tokens, mask)[:, :-1]
    losses = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    counted = weights[:, 1:] * (documents[:, 1:] == documents[:, :-1]) / 100
    weighted = losses * counted.flatten()
    sums = torch.zeros(2, len(CATEGORIES), device=batch.device)
    sums = sums.index_add(1, categories[:, 1:].flatten(), torch.stack((weighted.detach(), counted.flatten())))
    return weighted.sum() / counted.sum(), sums


def make_step(model: Tiny, device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The loss of a batch; on a GPU compiled, with attention by blocks."""
    if device.type == "cpu":
        return lambda batch: losses_of(model, batch, dense_mask(batch[:, 2]))
    compiled, masks = torch.compile(losses_of), torch.compile(block_mask)
    return lambda batch: compiled(model, batch, masks(batch[:, 2].contiguous()))


def export(model: Tiny, options: argparse.Namespace) -> None:
    """Write a bfloat16 checkpoint in Hugging Face's form."""
    options.output.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()
    }
    save_file(state, str(options.output / "model.safetensors"), metadata={"format": "pt"})
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    config = model.shape.hf_config(ends, tokenizer.token_to_id("<|pad|>"))
    (options.output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in FILES:
        if options.output.resolve() != options.model.resolve():
            shutil.copy(options.model / name, options.output / name)


def report(step: int, sums: Tensor, start: float, tokens: int) -> None:
    values = sums.cpu()
    means = values[0] / values[1].clamp(min=1e-9)
    listed = " ".join(f"{name[:6]} {mean:.3f}" for name, mean in zip(CATEGORIES, means.tolist(), strict=True))
    seconds = time.monotonic() - start
    print(f"step {step} {seconds:.0f}s {tokens / seconds / 1e6:.2f}Mtok/s | {listed}", flush=True)


def main() -> None:
    options = parse()
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Tiny(Shape()).to(device)
    print(
        f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters on {device}", flush=True
    )
    optimizers = make_optimizers(model, options.lr, options.weight_decay)
    first = 0
    if options.resume:
        state = torch.load(options.resume, map_location=device, weights_only=True)
        first = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    batches = Batches(options.data, options.model, options.rows, options.length, options.steps, options.seed, first)
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=options.workers,
        prefetch_factor=4 if options.workers else None,
        pin_memory=device.type == "cuda",
    )
    step = train(model, optimizers, loader, options, first)
    export(model, options)
    if options.save:
        state = {
            "step": step,
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        }
        torch.save(state, options.save)


def train(
    model: Tiny,
    optimizers: list[torch.optim.Optimizer],
    loader: DataLoader[Tensor],
    options: argparse.Namespace,
    first: int,
) -> int:
    """Run the schedule from step `first`; the step it ended at."""
    device = next(model.parameters()).device
    loss_of = make_step(model, device)
    start, tokens = time.monotonic(), 0
    total = torch.zeros(2, len(CATEGORIES), device=device)
    step = first
    for step, batch in enumerate(loader, first):
        if step == first + 10:
            start, tokens = time.monotonic(), 0  # the first steps compile
        progress = step / options.steps
        if options.minutes:
            progress = max(progress, (time.monotonic() - start) / 60 / options.minutes)
        if progress >= 1 or (options.stop_after and step >= first + options.stop_after):
            return step
        loss, sums = loss_of(batch.to(device, non_blocking=True).long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = options.lr * learning_rate(step, progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += batch.shape[0] * batch.shape[2]
        total += sums
        if step % 100 == 99 or step in (first + 5, first + 20):
            report(step + 1, total, start, tokens)
            total.zero_()
    return step + 1


if __name__ == "__main__":
    main()
