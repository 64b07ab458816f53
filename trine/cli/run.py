"""`trine run`: the answer to one prompt, as it comes."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from trine.cli.options import add_engine_options, add_model, add_sampling_options, engine_options, sampling_options
from trine.cli.terminal import styled, waiting

if TYPE_CHECKING:
    from trine.llm.api import AsyncLLM

USAGE = "MODEL [PROMPT] [options]"

DESCRIPTION = """\
Answer one prompt and end. The answer streams to standard output, everything else goes to standard error.

A model with a chat template gets the prompt as a user's turn; --raw sends the text as it is, to be continued.
"""

EXAMPLES = """\
examples:
  trine run tiny "What is 12 + 30?"
  trine run tiny "Sort: 5 3 9 1" --verbose                   with tokens and times
  trine run ./gpt2 --raw "Once upon a time" --max-tokens 50 --temperature 0.8
  git diff | trine run ./Qwen2.5-7B-Instruct - --system "Write a commit message for this change."
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", default="-", help="the text; - reads standard input")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument("--raw", action="store_true", help="no chat template: continue the text")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of the text")
    parser.add_argument("--verbose", action="store_true", help="tokens and times on standard error")
    add_sampling_options(parser, temperature=0.0)
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    from trine.core.errors import ConfigurationError

    prompt = args.prompt
    if prompt == "-":
        if sys.stdin.isatty():
            raise ConfigurationError(f'no prompt: write it after the model, as in `trine run {args.model} "Hello"`')
        prompt = sys.stdin.read()
    return asyncio.run(answer(args, prompt))


async def answer(args: argparse.Namespace, prompt: str) -> int:
    from trine.llm.api import AsyncLLM
    from trine.llm.sampling.params import SamplingParams

    engine = AsyncLLM(args.model, engine_process=False, **engine_options(args))
    try:
        with waiting(f"loading {args.model}"):
            await engine.start()
        started = time.monotonic()
        first: float | None = None
        stream = engine.stream(engine_prompt(engine, args, prompt), SamplingParams(**sampling_options(args)))
        texts: list[str] = []
        tokens = 0
        reason: str | None = None
        async for deltas in stream:
            first = first or time.monotonic()
            for delta in deltas:
                tokens += len(delta.token_ids)
                texts.append(delta.text)
                reason = delta.finish_reason or reason
                if not args.json:
                    print(delta.text, end="", flush=True)
        ended = time.monotonic()
    finally:
        await engine.close()
    facts = {
        "prompt_tokens": len(stream.prompt_token_ids),
        "output_tokens": tokens,
        "finish_reason": reason,
        "first_token_s": round((first or ended) - started, 4),
        "total_s": round(ended - started, 4),
    }
    if args.json:
        print(json.dumps({"text": "".join(texts), **facts}, ensure_ascii=False))
    else:
        print()
    if args.verbose:
        print(styled(", ".join(f"{name} {value}" for name, value in facts.items()), "dim", sys.stderr), file=sys.stderr)
    return 0


def engine_prompt(engine: AsyncLLM, args: argparse.Namespace, prompt: str) -> Any:
    """The text itself, or its token ids as a user's turn."""
    tokenizer = engine.tokenizer
    if args.raw or tokenizer is None or not tokenizer.has_chat_template:
        return prompt
    messages = [{"role": "system", "content": args.system}] if args.system else []
    messages.append({"role": "user", "content": prompt})
    return {"prompt_token_ids": tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)}
