"""`trine chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trine.cli.options import add_engine_options, add_model, add_sampling_options, engine_options, sampling_options
from trine.cli.terminal import styled, waiting
from trine.core.errors import ConfigurationError, RequestError, TrineError

if TYPE_CHECKING:
    from trine.llm.api import AsyncLLM
    from trine.llm.sampling.params import SamplingParams

USAGE = "MODEL [options]"

DESCRIPTION = """\
Talk with a model. Its answers stream; the conversation so far is kept in the prefix cache, so each turn costs only
what is new. Ctrl-C stops an answer, Ctrl-D (or /exit) ends. /help lists the commands.
"""

EXAMPLES = """\
examples:
  trine chat tiny
  trine chat ./Qwen2.5-7B-Instruct --system "Answer in French." --temperature 0.7 --top-p 0.9
"""

HELP = """\
/system TEXT      set the system prompt and start anew
/set NAME VALUE   a sampling option: temperature, top_p, top_k, min_p, seed, max_tokens, repetition_penalty, …
/retry            answer the last message again
/undo             forget the last message and its answer
/clear            forget the conversation
/stats            tokens and times of the last answer
/save FILE        write the conversation as JSON
/exit             end"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    add_sampling_options(parser, temperature=0.0)
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    return asyncio.run(converse(args))


async def converse(args: argparse.Namespace) -> int:
    from trine.llm.api import AsyncLLM
    from trine.llm.sampling.params import SamplingParams

    engine = AsyncLLM(args.model, engine_process=False, **engine_options(args))
    try:
        with waiting(f"loading {args.model}"):
            await engine.start()
        if engine.tokenizer is None or not engine.tokenizer.has_chat_template:
            raise ConfigurationError(
                f"{args.model} has no chat template, so it can't converse: continue a text with `trine run --raw`"
            )
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history in input()
        print(styled(f"{engine.model_name}, context {engine.max_model_len} tokens. /help lists the commands.", "dim"))
        session = Session(engine, SamplingParams(**sampling_options(args)), args.system)
        while True:
            try:
                line = await asyncio.to_thread(input, styled("> ", "bold"))
            except (EOFError, KeyboardInterrupt):
                print()
                return 0
            if line.strip() == "/exit":
                return 0
            try:
                await session.take(line.strip())
            except TrineError as error:
                print(styled(error.message, "red"))
    finally:
        await engine.close()


@dataclass
class Session:
    """The conversation, and what the user set about it."""

    engine: AsyncLLM
    params: SamplingParams
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    stats: str = "nothing was said yet"

    async def take(self, line: str) -> None:
        """One line of the user: a command, or a message to answer."""
        if not line:
            return
        if line.startswith("/"):
            await self._command(line)
            return
        self.messages.append({"role": "user", "content": line})
        await self._answer()

    async def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        if name == "retry":
            self._drop("assistant")
            if not self.messages:
                raise RequestError("there is nothing to answer yet")
            await self._answer()
            return
        commands: dict[str, Callable[[str], str]] = {
            "help": lambda _: HELP,
            "system": self._set_system,
            "set": self._set,
            "undo": self._undo,
            "clear": self._clear,
            "stats": lambda _: self.stats,
            "save": self._save,
        }
        if name not in commands:
            raise RequestError(f"there is no command /{name}; /help lists them")
        print(styled(commands[name](rest.strip()), "dim"))

    def _set_system(self, text: str) -> str:
        self.system = text or None
        return self._clear("")

    def _clear(self, _: str) -> str:
        self.messages.clear()
        return "a new conversation"

    def _undo(self, _: str) -> str:
        self._drop("assistant")
        self._drop("user")
        return f"{len(self.messages)} messages left"

    def _drop(self, role: str) -> None:
        if self.messages and self.messages[-1]["role"] == role:
            self.messages.pop()

    def _set(self, text: str) -> str:
        name, _, value = text.partition(" ")
        try:
            self.params = self.params.replace(**{name: json.loads(value)})
        except (TypeError, ValueError) as error:
            raise RequestError(
                f"/set {text}: write a sampling option and a JSON value, as in /set top_p 0.9"
            ) from error
        return f"{name} is {value}"

    def _save(self, path: str) -> str:
        if not path:
            raise RequestError("/save needs a file name")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self._conversation(), file, ensure_ascii=False, indent=1)
        return f"{len(self.messages)} messages in {path}"

    def _conversation(self) -> list[dict[str, Any]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.messages

    async def _answer(self) -> None:
        """Stream the answer to the conversation; Ctrl-C keeps what came so far."""
        tokenizer = self.engine.tokenizer
        assert tokenizer is not None
        token_ids = tokenizer.encode(tokenizer.render_chat(self._conversation()), add_special_tokens=False)
        started = time.monotonic()
        try:
            stream = self.engine.stream({"prompt_token_ids": token_ids}, self.params)
        except TrineError:
            self._drop("user")
            raise
        loop = asyncio.get_running_loop()
        texts: list[str] = []
        tokens, first = 0, started
        interrupted = asyncio.Event()
        loop.add_signal_handler(signal.SIGINT, interrupted.set)
        try:
            async for deltas in stream:
                first = first if tokens else time.monotonic()
                for delta in deltas:
                    tokens += len(delta.token_ids)
                    texts.append(delta.text)
                    sys.stdout.write(delta.text)
                sys.stdout.flush()
                if interrupted.is_set():
                    print(styled(" [stopped]", "dim"), end="")
                    break
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            stream.cancel()
        print()
        self.messages.append({"role": "assistant", "content": "".join(texts)})
        decode = time.monotonic() - first
        rate = f", {(tokens - 1) / decode:.1f} tokens/s" if tokens > 1 and decode > 0 else ""
        self.stats = (
            f"{len(token_ids)} prompt tokens, {stream.num_cached_tokens} of them cached; first token after "
            f"{1000 * (first - started):.0f} ms; {tokens} tokens{rate}"
        )
