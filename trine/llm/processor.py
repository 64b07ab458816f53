"""Between users and the engine: prompts become sequences to generate, their tokens become text.

All of this runs in the caller's process, so that the engine's spends its time on steps.
"""

from __future__ import annotations

import itertools
import random
import secrets
import time
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from trine.core.errors import RequestError
from trine.llm.detokenizer import IncrementalDetokenizer, OutputText
from trine.llm.outputs import (
    CompletionOutput,
    Delta,
    FinishReason,
    Logprob,
    RequestOutput,
    RequestTimes,
    TokenLogprobs,
)
from trine.llm.request import SequenceOutput, SequenceRequest, TokenScores
from trine.llm.sampling.params import SamplingParams
from trine.llm.tokenizer import Tokenizer

Prompt = str | Mapping[str, list[int]]
"""Text, or {"prompt_token_ids": [...]}."""


@dataclass(slots=True)
class SequenceState:
    """One sequence of a request on its way out."""

    output: CompletionOutput
    text: OutputText | None

    @property
    def finished(self) -> bool:
        return self.output.finish_reason is not None


@dataclass(slots=True)
class RequestState:
    """A request in progress. `sequences` by engine id."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    sequences: dict[int, SequenceState]
    times: RequestTimes
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: str | None = None
    deltas: list[Delta] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return all(sequence.finished for sequence in self.sequences.values())

    def unfinished_ids(self) -> list[int]:
        return [sequence_id for sequence_id, sequence in self.sequences.items() if not sequence.finished]

    def complete(self, result: RequestOutput) -> None:
        """Take over a result that was computed elsewhere, as one delta a sequence."""
        self.num_cached_tokens = result.num_cached_tokens
        self.sequences = {-output.index: SequenceState(output, None) for output in result.outputs}
        self.times.finished = time.monotonic()
        self.deltas += [
            Delta(output.index, output.text, output.token_ids, None, output.finish_reason, output.stop_reason)
            for output in result.outputs
        ]

    def result(self) -> RequestOutput:
        """The n best sequences of best_of, by mean log-probability; in their order when all are wanted."""
        outputs = [sequence.output for sequence in self.sequences.values()]
        if len(outputs) > self.params.n:
            outputs.sort(key=lambda output: -(output.cumulative_logprob or 0.0) / max(1, len(output.token_ids)))
            outputs = outputs[: self.params.n]
            for index, output in enumerate(outputs):
                output.index = index
                if self.params.logprobs is None:
                    output.logprobs = output.cumulative_logprob = None
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=outputs,
            finished=self.finished,
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens,
            times=self.times,
        )


class Processor:
    """Checks and tokenises requests, and turns the engine's outputs into deltas of text."""

    def __init__(self, tokenizer: Tokenizer | None, *, vocab_size: int, max_model_len: int, seed: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self._random = random.Random(seed)
        self._ids = itertools.count(1)
        self._requests: dict[int, RequestState] = {}
        self._token_texts: dict[int, str] = {}

    # --- in --------------------------------------------------------------------------------------------------------

    def tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """The prompt's text, if it came as text, and its token ids; RequestError if it can't be served."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("this model has no tokenizer: give {'prompt_token_ids': [...]}", param="prompt")
            text, token_ids = prompt, self.tokenizer.encode(prompt)
        elif isinstance(prompt, Mapping) and set(prompt) == {"prompt_token_ids"}:
            text, token_ids = None, list(prompt["prompt_token_ids"])
        else:
            raise RequestError(
                f"prompt: expected a string or {{'prompt_token_ids': [...]}}, got {type(prompt).__name__}",
                param="prompt",
            )
        if not token_ids:
            raise RequestError("prompt is empty: give at least one token", param="prompt")
        self._check_prompt(token_ids)
        return text, token_ids

    def _check_prompt(self, token_ids: list[int]) -> None:
        try:
            largest = int(np.frombuffer(array("I", token_ids), dtype=np.uint32).max())  # a third of max()'s time
        except TypeError:
            bad: object = next(token for token in token_ids if not hasattr(token, "__index__"))
            raise RequestError(f"prompt: token id {bad!r} is no integer", param="prompt") from None
        except OverflowError:  # below 0, or above 32 bits
            largest = self.vocab_size
        if largest >= self.vocab_size:
            bad = next(token for token in token_ids if not 0 <= token < self.vocab_size)
            raise RequestError(
                f"prompt: token id {bad} is outside the vocabulary 0…{self.vocab_size - 1}", param="prompt"
            )

    def start(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        time_limit: float | None = None,
        salt: str | None = None,
    ) -> tuple[RequestState, list[SequenceRequest]]:
        """Check a request and register its sequences; RequestError says what is wrong with it."""
        text, token_ids = self.tokenize(prompt)
        max_tokens = self.room(token_ids, params)
        self._check_token_ids(params)
        if self.tokenizer is None and (params.stop or params.bad_words or params.guided is not None):
            raise RequestError("stop, bad_words and guided output need a tokenizer, which this model does not have")
        state = RequestState(
            request_id=request_id or secrets.token_hex(16),
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            sequences={},
            times=RequestTimes(arrival=time.monotonic()),
        )
        inner = params
        if params.num_sequences > params.n and params.logprobs is None:
            inner = params.replace(logprobs=0)  # needed to tell which are the best
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        bad_words = self._bad_words(params)
        requests = []
        for index in range(params.num_sequences):
            sequence_id = next(self._ids)
            requests.append(
                SequenceRequest(
                    id=sequence_id,
                    prompt_token_ids=token_ids,
                    params=inner,
                    seed=seed if index == 0 else random.Random(f"{seed}/{index}").getrandbits(63),
                    max_tokens=max_tokens,
                    bad_words_token_ids=bad_words,
                    priority=priority,
                    time_limit=time_limit,
                    salt=salt,
                )
            )
            state.sequences[sequence_id] = SequenceState(CompletionOutput(index), self._output_text(params, token_ids))
            self._requests[sequence_id] = state
        return state, requests

    def check(self, prompt: Prompt, params: SamplingParams) -> None:
        """RequestError if the request can't be served; nothing is registered."""
        _, token_ids = self.tokenize(prompt)
        self.room(token_ids, params)
        self._check_token_ids(params)

    def placeholder(
        self, prompt: str | None, prompt_token_ids: list[int], params: SamplingParams, request_id: str | None
    ) -> RequestState:
        """A request whose sequences the engine does not know: beam search fills it in with `RequestState.complete`."""
        sequences = {-index: SequenceState(CompletionOutput(index), None) for index in range(params.n)}
        times = RequestTimes(arrival=time.monotonic())
        return RequestState(request_id or secrets.token_hex(16), prompt, prompt_token_ids, params, sequences, times)

    def room(self, token_ids: list[int], params: SamplingParams) -> int:
        """Output tokens that the request may have."""
        room = self.max_model_len - len(token_ids)
        if room < max(1, params.max_tokens or 1, params.min_tokens):
            wanted = f" and {params.max_tokens} output tokens were asked for" if params.max_tokens else ""
            raise RequestError(
                f"this model's context is {self.max_model_len} tokens; the prompt has {len(token_ids)}{wanted}: "
                "shorten the prompt or lower max_tokens",
                param="prompt" if room < 1 else "max_tokens",
                code="context_length_exceeded",
            )
        return room if params.max_tokens is None else params.max_tokens

    def _check_token_ids(self, params: SamplingParams) -> None:
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for token_id in ids:
                if not 0 <= token_id < self.vocab_size:
                    raise RequestError(
                        f"{name}: token id {token_id} is outside the vocabulary 0…{self.vocab_size - 1}", param=name
                    )

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        """Token sequences of each bad word, as it begins a text and as it follows a space."""
        if not params.bad_words or self.tokenizer is None:
            return []
        sequences: dict[tuple[int, ...], None] = {}
        for word in params.bad_words:
            for form in (word, " " + word.lstrip()):
                token_ids = tuple(self.tokenizer.encode(form, add_special_tokens=False))
                if token_ids:
                    sequences[token_ids] = None
        return [list(token_ids) for token_ids in sequences]

    def _output_text(self, params: SamplingParams, prompt_token_ids: list[int]) -> OutputText | None:
        if self.tokenizer is None or not params.detokenize:
            return None
        detokenizer = IncrementalDetokenizer(self.tokenizer, prompt_token_ids, params.skip_special_tokens)
        return OutputText(detokenizer, params.stop, params.include_stop_str_in_output)

    # --- out -------------------------------------------------------------------------------------------------------

    def process(self, outputs: Iterable[SequenceOutput]) -> tuple[list[RequestState], list[int]]:
        """Append deltas to the requests that the outputs belong to. Returns these, and the sequences to abort: those
        whose text holds a stop string, which the engine can't see.
        """
        touched: dict[int, RequestState] = {}
        to_abort = []
        now = time.monotonic()
        for output in outputs:
            state = self._requests.get(output.id)
            if state is None:
                continue  # cancelled or stopped while the engine was ahead
            delta = self._advance(state, output, now)
            state.deltas.append(delta)
            touched[id(state)] = state
            if delta.finish_reason is not None:
                del self._requests[output.id]
                if output.finish_reason is None:
                    to_abort.append(output.id)
                if state.finished:
                    state.times.finished = now
        return list(touched.values()), to_abort

    def forget(self, state: RequestState) -> list[int]:
        """Drop a request that nobody waits for; returns the sequences to abort."""
        ids = state.unfinished_ids()
        for sequence_id in ids:
            self._requests.pop(sequence_id, None)
            state.sequences[sequence_id].output.finish_reason = "abort"
        return ids

    def _advance(self, state: RequestState, output: SequenceOutput, now: float) -> Delta:
        sequence = state.sequences[output.id]
        done = sequence.output
        if state.times.first_token is None and output.token_ids:
            state.times.first_token = now
            state.times.first_scheduled = output.first_scheduled
            state.num_cached_tokens = output.num_cached_tokens
        if output.prompt_scores is not None and state.prompt_logprobs is None:
            state.prompt_logprobs = [None, *self._logprobs(output.prompt_scores, state.prompt_token_ids[1:])]
        state.error = output.error or state.error
        reason: FinishReason | None = output.finish_reason
        stop_reason: int | str | None = output.stop_token_id
        done.token_ids.extend(output.token_ids)
        text, stop = self._text(state.params, sequence, output)
        if stop is not None:
            reason, stop_reason = "stop", stop
        logprobs = None
        if output.scores is not None:
            logprobs = self._logprobs(output.scores, output.token_ids)
            done.logprobs = (done.logprobs or []) + logprobs
            done.cumulative_logprob = (done.cumulative_logprob or 0.0) + sum(score.logprob for score in output.scores)
        done.text += text
        done.finish_reason = reason
        done.stop_reason = stop_reason
        return Delta(done.index, text, output.token_ids, logprobs, reason, stop_reason)

    def _text(self, params: SamplingParams, sequence: SequenceState, output: SequenceOutput) -> tuple[str, str | None]:
        """New text, and the stop string that ended it. A token that ends the sequence is not part of its text."""
        if sequence.text is None:
            return "", None
        shown = output.token_ids
        ended_by_token = (
            output.finish_reason == "stop" and bool(shown) and self._is_end(shown[-1], output.stop_token_id)
        )
        if ended_by_token and not params.include_stop_str_in_output:
            shown = shown[:-1]
        allow_stop = len(sequence.output.token_ids) > params.min_tokens
        text, stop = sequence.text.push(shown, allow_stop) if shown else ("", None)
        if output.finish_reason is not None and stop is None:
            text += sequence.text.flush()
            stop = sequence.text.stop_string  # held-back bytes may have completed one
        return text, stop

    def _is_end(self, token_id: int, stop_token_id: int | None) -> bool:
        assert self.tokenizer is not None
        return token_id == stop_token_id or token_id in self.tokenizer.eos_token_ids

    def _logprobs(self, scores: list[TokenScores], token_ids: list[int]) -> list[TokenLogprobs]:
        result = []
        for score, token_id in zip(scores, token_ids, strict=True):
            entry: TokenLogprobs = {token_id: Logprob(score.logprob, score.rank, self._token_text(token_id))}
            for rank, (top_id, logprob) in enumerate(zip(score.top_ids, score.top_logprobs, strict=True), start=1):
                if top_id not in entry:
                    entry[top_id] = Logprob(logprob, rank, self._token_text(top_id))
            result.append(entry)
        return result

    def _token_text(self, token_id: int) -> str:
        if self.tokenizer is None:
            return ""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self.tokenizer.token_text(token_id)
        return text
