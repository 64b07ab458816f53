"""python write_checkpoint.py DIRECTORY: random weights, and a tokenizer of the right size, for its config.json.

Biases are random too: zeros would hide one that an engine forgets.
"""

from __future__ import annotations

import sys

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast


def main(directory: str) -> None:
    config = AutoConfig.from_pretrained(directory)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
    model.save_pretrained(directory)
    write_tokenizer(directory, config.vocab_size)


def write_tokenizer(directory: str, vocab_size: int) -> None:
    """Bytes, filler and two specials: engines that insist on a tokenizer have one, and no measurement uses it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    filler = [f"<filler{i}>" for i in range(vocab_size - len(letters) - 2)]
    vocabulary = {token: i for i, token in enumerate([*letters, *filler])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|pad|>", special=True), AddedToken("<|end|>", special=True)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>").save_pretrained(
        directory
    )


if __name__ == "__main__":
    main(sys.argv[1])
