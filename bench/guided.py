"""Cost of guided decoding: compiling a schema, the mask of a token, and whether outputs are valid; xgrammar beside it.

    python bench/guided.py [--model DIR|tiny] [--schemas N] [--max-tokens N] [--json FILE]

Schemas are random (tests/llm/sampling/schemas.py); tokens are drawn uniformly from the mask, with one in seven a
closing one where there is such: what a model with random weights would do at a high temperature. Trine's masks hold
numbers short and complete the text before the budget ends; the peer's do neither, and its outputs may be cut off.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import jsonschema
import numpy as np
import torch

from tests.llm.sampling.schemas import random_schema
from trine.llm.loading import resolve_model
from trine.llm.sampling.grammar import GrammarCompiler
from trine.llm.sampling.params import GuidedParams
from trine.llm.tokenizer import Tokenizer


class State(Protocol):
    """One sequence in a grammar."""

    def fill_mask(self, row: torch.Tensor, remaining: int) -> None: ...
    def accept(self, token: int) -> bool: ...
    def is_finished(self) -> bool: ...


@dataclass
class Figures:
    """Milliseconds a schema, microseconds a mask, and what became of the outputs."""

    compile_ms: list[float] = field(default_factory=list)
    mask_us: list[float] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        quantiles = {"p50": 0.5, "p99": 0.99, "max": 1.0}
        summary: dict[str, Any] = {"outcomes": self.outcomes, "mask_us_mean": float(np.mean(self.mask_us))}
        for name, values in (("compile_ms", self.compile_ms), ("mask_us", self.mask_us)):
            summary |= {f"{name}_{label}": float(np.quantile(values, q)) for label, q in quantiles.items()}
        return summary


def trine_states(tokenizer: Tokenizer) -> Callable[[dict[str, Any]], State]:
    compiler = GrammarCompiler(tokenizer)
    compiler.compile(GuidedParams(json_object=True))  # the vocabulary is read once
    return lambda schema: compiler.new_state(compiler.compile(GuidedParams(json=schema)))


def xgrammar_states(tokenizer: Tokenizer) -> Callable[[dict[str, Any]], State]:
    import xgrammar

    class Matcher:
        def __init__(self, schema: dict[str, Any]) -> None:
            compiled = compiler.compile_json_schema(json.dumps(schema), any_whitespace=True, max_whitespace_cnt=16)
            self._matcher = xgrammar.GrammarMatcher(compiled)

        def fill_mask(self, row: torch.Tensor, remaining: int) -> None:
            self._matcher.fill_next_token_bitmask(row[None])

        def accept(self, token: int) -> bool:
            return bool(self._matcher.accept_token(token))

        def is_finished(self) -> bool:
            return bool(self._matcher.is_terminated())

    vocabulary = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]
    info = xgrammar.TokenizerInfo(
        vocabulary, xgrammar.VocabType.RAW, vocab_size=len(vocabulary), stop_token_ids=list(tokenizer.eos_token_ids)
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    return Matcher


def measure(states: Callable[[dict[str, Any]], State], tokenizer: Tokenizer, schemas: int, max_tokens: int) -> Figures:
    figures = Figures()
    vocab = tokenizer.vocab_size
    row = torch.zeros(-(-vocab // 32), dtype=torch.int32)
    closing = np.array([tokenizer.token_bytes(index)[:1] in (b'"', b"]", b"}") for index in range(vocab)])
    for seed in range(schemas):
        schema, rng = random_schema(random.Random(seed)), np.random.default_rng(seed)
        start = time.perf_counter()
        try:
            state = states(schema)
        except Exception:
            figures.outcomes["refused"] = figures.outcomes.get("refused", 0) + 1
            continue
        figures.compile_ms.append((time.perf_counter() - start) * 1e3)
        data, finished = b"", False
        for written in range(max_tokens):
            start = time.perf_counter()
            state.fill_mask(row, max_tokens - written)
            figures.mask_us.append((time.perf_counter() - start) * 1e6)
            allowed = np.unpackbits(row.numpy().view(np.uint8), count=vocab, bitorder="little").view(np.bool_)
            likely = allowed & closing if rng.random() < 1 / 7 and (allowed & closing).any() else allowed
            token = int(rng.choice(np.flatnonzero(likely)))
            finished = token in tokenizer.eos_token_ids
            if finished:
                break
            state.accept(token)
            data += tokenizer.token_bytes(token)
            finished = state.is_finished()
            if finished:
                break
        outcome = judge(data, schema) if finished else "cut off"
        figures.outcomes[outcome] = figures.outcomes.get(outcome, 0) + 1
    return figures


def judge(data: bytes, schema: dict[str, Any]) -> str:
    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(data))
    except ValueError:
        return "not JSON"
    except jsonschema.ValidationError:
        return "invalid"
    return "valid"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a model directory, or tiny: its tokenizer is used")
    parser.add_argument("--schemas", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=500)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_directory(resolve_model(arguments.model))
    peers = {"trine": trine_states}
    if importlib.util.find_spec("xgrammar"):
        peers["xgrammar"] = xgrammar_states
    records = {}
    for name, make in peers.items():
        figures = measure(make(tokenizer), tokenizer, arguments.schemas, arguments.max_tokens)
        records[name] = figures.record()
        print(name, ", ".join(f"{count} {outcome}" for outcome, count in sorted(figures.outcomes.items())))
        for key, value in records[name].items():
            if key != "outcomes":
                print(f"  {key:16} {value:10.2f}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"vocab": tokenizer.vocab_size, **records}, file, indent=1)


if __name__ == "__main__":
    main()
