"""Score a checkpoint on held-out items with Transformers, in batches: the twin of `trine eval` for use while training.

python -m models.tiny.evaluate DIRECTORY --items 500
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

from models.tiny.chat import render
from trine.evaluation import TASKS, Item, is_right, make_items
from trine.evaluation.scorer import ANSWER_TOKENS


@torch.inference_mode()
def answers(model: Qwen3ForCausalLM, tokenizer: Tokenizer, items: list[Item]) -> list[tuple[str, bool]]:
    """Greedy answers to a batch, and whether they ended by themselves."""
    segments = [render([*item.messages, {"role": "assistant", "content": ""}], item.tools) for item in items]
    prompts = [tokenizer.encode(parts[0][0], add_special_tokens=False).ids for parts in segments]
    end, pad = (tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|pad|>"))
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    outputs = model.generate(
        ids,
        attention_mask=(ids != pad).long(),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=pad,
    )
    results = []
    for output in outputs[:, width:].tolist():
        stopped = end in output
        output = output[: output.index(end)] if stopped else output
        results.append((tokenizer.decode(output, skip_special_tokens=True), stopped))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="*", default=TASKS)
    parser.add_argument("--show", type=int, default=4, help="wrong answers to print for each task")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    model = Qwen3ForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    model = model.to(device).eval()
    shares = {}
    for task in options.tasks:
        start = time.monotonic()
        items = make_items(
            task,
            options.seed,
            options.items,
            "heldout",
            lambda texts: [len(e.ids) for e in tokenizer.encode_batch(texts)],
        )
        items.sort(key=lambda item: sum(len(message["content"]) for message in item.messages))
        size = 50 if task.startswith("lookup") else 250
        results = [
            pair for at in range(0, len(items), size) for pair in answers(model, tokenizer, items[at : at + size])
        ]
        wrong = [
            (item, text)
            for item, (text, stopped) in zip(items, results, strict=True)
            if not is_right(item, text, stopped)
        ]
        shares[task] = 1 - len(wrong) / len(items)
        print(f"{task} {shares[task]:.4f} ({time.monotonic() - start:.0f}s)", flush=True)
        for item, text in wrong[: options.show]:
            print(f"    {item.messages[-1]['content'][-120:]!r} -> {text!r}, not {item.answer!r}")
    print(json.dumps({"tasks": shares}))


if __name__ == "__main__":
    main()
