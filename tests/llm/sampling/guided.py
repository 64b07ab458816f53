"""Drives a grammar with a sampler over random logits: what a model with random weights would write."""

from __future__ import annotations

import functools
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from trine.llm.sampling.grammar import GrammarCompiler, GrammarState
from trine.llm.sampling.params import GuidedParams, SamplingParams
from trine.llm.sampling.sampler import Sampler
from trine.llm.tokenizer import Tokenizer

PADDING = 37  # rows of the model's vocabulary that the tokenizer does not know
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@functools.cache
def tokenizer() -> Tokenizer:
    """Byte-level BPE of 2,000 tokens, many of which hold quotes, brackets and digits; two of them end a sequence."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    code = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_text()
    records = [{"id": n * 7919, "price": n / 8, "tags": ["red", "blue"], "ok": True, "none": None} for n in range(200)]
    backend.train_from_iterator([code, json.dumps(records), json.dumps(records, indent=1)], trainer)
    backend.add_special_tokens(list(SPECIAL))
    return Tokenizer(backend, eos_token_ids=[backend.token_to_id(SPECIAL[0]), backend.token_to_id(SPECIAL[2])])


@functools.cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tokenizer())


@dataclass
class Written:
    """text: what was written; finished: the grammar ended it, not the budget."""

    text: str
    finished: bool
    num_tokens: int


def write(guided: GuidedParams, seed: int, budget: int = 600, *, temperature: float = 1.0) -> Written:
    """Sample an output of at most `budget` tokens. Fails when the sampler and the grammar disagree."""
    vocab = tokenizer().vocab_size + PADDING
    sampler = Sampler(1, vocab, "cpu")
    sampler.set_row(
        0,
        SamplingParams(temperature=temperature, guided=guided),
        prompt_token_ids=[],
        output_token_ids=[],
        eos_token_ids=tokenizer().eos_token_ids,
        bad_words_token_ids=[],
        seed=seed,
    )
    state = compiler().new_state(compiler().compile(guided))
    logits = torch.randn((8, vocab), generator=torch.Generator().manual_seed(seed))
    bitmask = torch.empty((1, -(-vocab // 32)), dtype=torch.int32)
    tokens: list[int] = []
    finished = False
    while not finished and len(tokens) < budget:
        state.fill_mask(bitmask[0], budget - len(tokens))
        token = int(sampler.sample(logits[len(tokens) % 8 :][:1].clone(), [0], [len(tokens)], bitmask).tokens)
        assert 0 <= token < tokenizer().vocab_size
        assert state.accept(token)
        if token not in tokenizer().eos_token_ids:
            tokens.append(token)
        finished = state.is_finished()
    text = b"".join(tokenizer().token_bytes(token) for token in tokens).decode()
    return Written(text, finished, len(tokens))


def state_of(guided: GuidedParams) -> GrammarState:
    return compiler().new_state(compiler().compile(guided))


def allowed(state: GrammarState, remaining: int | None = None) -> set[int]:
    """Ids that the state's mask allows, over the model's vocabulary."""
    row = torch.zeros(-(-(tokenizer().vocab_size + PADDING) // 32), dtype=torch.int32)
    state.fill_mask(row, remaining)
    return {index for index in range(len(row) * 32) if int(row[index // 32]) >> (index % 32) & 1}


def accepts(guided: GuidedParams, text: str) -> bool:
    """Whether the text, byte by byte, is a whole output of the grammar."""
    state = state_of(guided)
    single = {tokenizer().token_bytes(index): index for index in range(256)}
    for byte in text.encode():
        if not state.accept(single[bytes([byte])]):
            return False
    return state.is_finished() or bool(allowed(state) & set(tokenizer().eos_token_ids))
