"""What a user imports: `LLM` for scripts, `AsyncLLM` for servers. Both are thin over `Processor` and `EngineCore`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trine.core.errors import DeadlineExceededError, EngineDeadError, OverloadedError, RequestError, TrineError
from trine.llm.beam import Beam, Candidates, beam_search
from trine.llm.client import EngineInfo, EngineTransport, Message, ProcessTransport, ThreadTransport, dead
from trine.llm.loading import resolve_model
from trine.llm.options import EngineOptions
from trine.llm.outputs import CompletionOutput, Delta, EngineStats, RequestOutput
from trine.llm.processor import Processor, Prompt, RequestState
from trine.llm.request import SequenceRequest
from trine.llm.sampling.params import SamplingParams
from trine.llm.tokenizer import Tokenizer
from trine.llm.tokenizer_files import CONVERTIBLE

logger = logging.getLogger(__name__)


class LLM:
    """A language model in this process.

    model is a directory with a Hugging Face checkpoint, a hub name, or "tiny", the model that ships with Trine; the
    other options are those of `EngineOptions`.

    >>> llm = LLM("tiny")
    >>> llm.generate("Once upon a time", SamplingParams(max_tokens=20))[0].outputs[0].text  # doctest: +SKIP
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        from trine.llm.build import build_engine

        self.options = _options(model, options)
        self.tokenizer = load_tokenizer(self.options)
        self._core, self.info = build_engine(self.options)
        self._processor = _processor(self.tokenizer, self.info, self.options)

    @property
    def max_model_len(self) -> int:
        return self.info.max_model_len

    @property
    def stats(self) -> EngineStats:
        return self._core.stats

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Generate for every prompt, in order. Prompts are strings or {"prompt_token_ids": [...]}.

        sampling_params: one for all, or one for each prompt. Raises RequestError for the first prompt that can't be
        served, before anything is computed.
        """
        one = isinstance(prompts, str | dict)
        every: Sequence[Prompt] = [prompts] if one else prompts  # type: ignore[list-item,assignment]
        params = sampling_params if sampling_params is not None else SamplingParams(**self.info.sampling_defaults)
        each = [params] * len(every) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(every):
            raise RequestError(f"sampling_params: got {len(each)} for {len(every)} prompts: give one, or one for each")
        states: list[RequestState | None] = []
        requests: list[SequenceRequest] = []
        try:
            for prompt, own in zip(every, each, strict=True):
                if own.use_beam_search:
                    self._processor.check(prompt, own)
                    states.append(None)
                    continue
                state, started = self._processor.start(prompt, own)
                states.append(state)
                requests += started
        except TrineError:
            for begun in states:
                if begun is not None:
                    self._processor.forget(begun)
            raise
        for request in requests:
            self._core.add(request)
        self._run([state for state in states if state is not None], use_tqdm)
        return [
            self._beam_search(prompt, own) if state is None else _checked(state)
            for state, prompt, own in zip(states, every, each, strict=True)
        ]

    def chat(
        self,
        messages: list[dict[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        **template_arguments: Any,
    ) -> RequestOutput:
        """Answer one conversation, rendered with the model's chat template."""
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer: use generate() with token ids")
        text = self.tokenizer.render_chat(messages, tools=tools, **template_arguments)
        token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        return self.generate({"prompt_token_ids": token_ids}, sampling_params)[0]

    def check(self) -> None:
        """Raise AssertionError if the engine lost or leaked a block or a row."""
        self._core.check()

    def close(self) -> None:
        self._core.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, states: list[RequestState], show_progress: bool) -> None:
        progress: Callable[[int], object] = lambda done: None  # noqa: E731
        if show_progress:
            from tqdm import tqdm

            progress = tqdm(total=len(states), unit="request").update
        try:
            while self._core.has_work:
                touched, to_abort = self._processor.process(self._core.step().outputs)
                for sequence_id in to_abort:
                    self._core.abort(sequence_id)
                for state in touched:
                    state.deltas.clear()
                    if state.finished:
                        progress(1)
        except BaseException:
            for state in states:
                for sequence_id in self._processor.forget(state):
                    self._core.abort(sequence_id)
            raise

    def _beam_search(self, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        text, token_ids = self._processor.tokenize(prompt)
        search = beam_search(params, self._processor.room(token_ids, params), self.info.eos_token_ids)
        try:
            wanted = next(search)
            while True:
                scoring = _beam_params(params)
                outputs = self.generate([{"prompt_token_ids": token_ids + beam} for beam in wanted], scoring)
                wanted = search.send([_candidates(output) for output in outputs])
        except StopIteration as stop:
            return _beam_output(stop.value, self.tokenizer, params, text, token_ids, outputs[0].num_cached_tokens)


class RequestStream:
    """A request in the engine. Iterate over lists of `Delta`s, everything since the last one; or `await collect()`.

    sink: called at once with deltas that end no sequence, in place of waking whoever iterates, which saves most of a
    token's way through the event loop. It returns False to leave them to the iteration. What ends a sequence, and
    errors, always come by iterating.
    """

    def __init__(self, engine: AsyncLLM, state: RequestState) -> None:
        self.sink: Callable[[list[Delta]], bool] | None = None
        self._engine = engine
        self._state = state
        self._news = asyncio.Event()
        self._error: TrineError | None = None

    @property
    def request_id(self) -> str:
        return self._state.request_id

    @property
    def prompt_token_ids(self) -> list[int]:
        return self._state.prompt_token_ids

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache; known once the first deltas came."""
        return self._state.num_cached_tokens

    @property
    def prompt_logprobs(self) -> list[Any] | None:
        return self._state.prompt_logprobs

    @property
    def state(self) -> RequestState:
        return self._state

    def wake(self, error: TrineError | None = None) -> None:
        """Called by the engine when there are deltas, or when there will be no more because of `error`."""
        self._error = self._error or error
        if self.sink is None or error is not None or not self._sunk(self.sink):
            self._news.set()

    def _sunk(self, sink: Callable[[list[Delta]], bool]) -> bool:
        deltas = self._state.deltas
        for delta in deltas:
            if delta.finish_reason is not None:
                return False
        self._state.deltas = []
        if sink(deltas):
            return True
        self._state.deltas = deltas
        return False

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                deltas, self._state.deltas = self._state.deltas, []
                if deltas:
                    yield deltas
                if self._error is not None:
                    raise self._error
                if self._state.finished:
                    _raise_for(self._state)
                    return
        finally:
            self.cancel()

    async def collect(self) -> RequestOutput:
        """Wait for the whole result."""
        async for _ in self:
            pass
        return self._state.result()

    def cancel(self) -> None:
        """Stop the request's work; nothing more comes. Harmless when it has finished."""
        self._engine.cancel(self)


class AsyncLLM:
    """The engine for servers: requests come and go in an event loop, the engine runs in a process of its own.

    An engine that dies fails its requests with EngineDeadError and is started again; `is_ready` is False meanwhile.
    """

    def __init__(self, model: str | Path, *, engine_process: bool = True, **options: Any) -> None:
        self.options = _options(model, options)
        self.is_ready = False
        self.is_draining = False
        self.restarts = 0
        self.stats = EngineStats()
        self.tokenizer: Tokenizer | None = None
        self._transport_class = ProcessTransport if engine_process else ThreadTransport
        self._transport: EngineTransport | None = None
        self._started: asyncio.Future[EngineInfo] | None = None
        self._info: EngineInfo | None = None
        self._processor: Processor | None = None
        self._streams: dict[int, RequestStream] = {}
        self._num_sequences = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure = "it is still loading"

    async def start(self) -> EngineInfo:
        """Load the model. TrineErrors of loading are raised here."""
        self.tokenizer = await asyncio.to_thread(load_tokenizer, self.options)
        return await self._launch()

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineDeadError(f"the engine is not ready: {self._failure}")
        return self._info

    @property
    def model_name(self) -> str:
        return self.info.model_name

    @property
    def max_model_len(self) -> int:
        return self.info.max_model_len

    @property
    def num_requests(self) -> int:
        """Requests that have not finished."""
        return len(self._streams)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        salt: str | None = None,
    ) -> RequestStream:
        """Start a request. deadline: seconds from now. priority: lower goes first. salt keeps its prefix cache apart.

        Raises RequestError (the request can't be served), OverloadedError (the queue is full), EngineDeadError.
        """
        self._admit(params.num_sequences)
        assert self._processor is not None
        if params.use_beam_search:
            self._processor.check(prompt, params)
            return self._start_beam_search(prompt, params, request_id)
        state, requests = self._processor.start(
            prompt, params, request_id=request_id, priority=priority, time_limit=deadline, salt=salt
        )
        stream = RequestStream(self, state)
        self._register(stream, len(requests))
        self._send(("add", requests))
        return stream

    async def generate(self, prompt: Prompt, params: SamplingParams, **options: Any) -> RequestOutput:
        """The whole result of one request; `options` as in `stream`."""
        return await self.stream(prompt, params, **options).collect()

    def cancel(self, stream: RequestStream) -> None:
        if self._streams.pop(id(stream.state), None) is None:
            return
        self._num_sequences -= len(stream.state.sequences)
        if not self._streams:
            self._idle.set()
        if self._processor is not None:
            ids = self._processor.forget(stream.state)
            if ids:
                self._send(("abort", ids))

    async def drain(self, timeout: float) -> bool:
        """Take no new requests and wait for the running ones; False if some are left after `timeout` seconds."""
        self.is_draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        self._closing = True
        self.is_ready = False
        for task in self._tasks:
            task.cancel()
        if self._transport is not None:
            await self._transport.close()
        self._fail_all(EngineDeadError("the engine was closed"))

    # --- the engine's life -----------------------------------------------------------------------------------------

    async def _launch(self) -> EngineInfo:
        self._started = asyncio.get_running_loop().create_future()
        self._transport = self._transport_class(self.options, self._on_message, self._on_end)
        return await self._started

    def _on_message(self, message: Message) -> None:
        kind, content = message
        if kind == "step":
            self.stats = content.stats
            assert self._processor is not None
            touched, to_abort = self._processor.process(content.outputs)
            if to_abort:
                self._send(("abort", to_abort))
            for state in touched:
                stream = self._streams.get(id(state))
                if stream is not None:
                    stream.wake()
        elif kind == "ready":
            self._info = content
            self._processor = _processor(self.tokenizer, content, self.options)
            self.is_ready = True
            if self._started is not None and not self._started.done():
                self._started.set_result(content)
        elif kind == "failed":
            self._failure = content.message
            if self._started is not None and not self._started.done():
                self._started.set_exception(content)

    def _on_end(self, reason: str) -> None:
        self.is_ready = False
        if self._closing:
            return
        if self._started is not None and not self._started.done():
            self._started.set_exception(EngineDeadError(f"the engine could not start: {reason}"))
            return
        if self._info is None:
            return  # loading failed with an error of its own
        self._failure = reason
        logger.error("%s; %d requests fail; starting it again", reason, len(self._streams))
        self._fail_all(dead(reason))
        task = asyncio.get_running_loop().create_task(self._restart())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _restart(self) -> None:
        """Start the engine again, waiting longer after each failure, at most half a minute."""
        pause = 0.0
        while not self._closing:
            await asyncio.sleep(pause)
            self.restarts += 1
            try:
                await self._launch()
            except TrineError as error:
                pause = min(30.0, 2 * pause + 1)
                logger.error("the engine did not start: %s; next try in %.0f s", error, pause)
            else:
                return

    def _fail_all(self, error: TrineError) -> None:
        for stream in list(self._streams.values()):
            stream.wake(error)

    def _admit(self, num_sequences: int) -> None:
        if self.is_draining:
            raise EngineDeadError("the server is shutting down: send the request to another")
        if not self.is_ready:
            raise EngineDeadError(f"the engine is not ready: {self._failure}")
        limit = self.info.max_num_seqs + self.options.max_waiting
        if self._num_sequences + num_sequences > limit:
            raise OverloadedError(
                f"{self._num_sequences} sequences are running or queued, the limit is {limit}: try again later, or "
                "raise --max-waiting",
                retry_after=1.0,
            )

    def _register(self, stream: RequestStream, num_sequences: int) -> None:
        self._streams[id(stream.state)] = stream
        self._num_sequences += num_sequences
        self._idle.clear()

    def _send(self, message: Message) -> None:
        if self._transport is not None and self.is_ready:
            self._transport.send(message)

    # --- beam search -----------------------------------------------------------------------------------------------

    def _start_beam_search(self, prompt: Prompt, params: SamplingParams, request_id: str | None) -> RequestStream:
        assert self._processor is not None
        text, token_ids = self._processor.tokenize(prompt)
        state = self._processor.placeholder(text, token_ids, params, request_id)
        stream = RequestStream(self, state)
        self._register(stream, len(state.sequences))
        task = asyncio.get_running_loop().create_task(self._beam_search(stream, text, token_ids, params))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    async def _beam_search(
        self, stream: RequestStream, text: str | None, token_ids: list[int], params: SamplingParams
    ) -> None:
        assert self._processor is not None
        search = beam_search(params, self._processor.room(token_ids, params), self.info.eos_token_ids)
        try:
            wanted = next(search)
            while id(stream.state) in self._streams:
                scoring = _beam_params(params)
                outputs = await asyncio.gather(
                    *(self.generate({"prompt_token_ids": token_ids + beam}, scoring) for beam in wanted)
                )
                wanted = search.send([_candidates(output) for output in outputs])
        except StopIteration as stop:
            result = _beam_output(stop.value, self.tokenizer, params, text, token_ids, outputs[0].num_cached_tokens)
            stream.state.complete(result)
            stream.wake()
        except TrineError as error:
            stream.wake(error)


def load_tokenizer(options: EngineOptions) -> Tokenizer | None:
    """The model's tokenizer; None when its directory has none: prompts are token ids then."""
    directory = Path(options.tokenizer) if options.tokenizer else resolve_model(options.model)
    if options.tokenizer is None and not any((directory / name).exists() for name in ("tokenizer.json", *CONVERTIBLE)):
        return None
    return Tokenizer.from_directory(directory)


def _options(model: str | Path, options: dict[str, Any]) -> EngineOptions:
    return replace(EngineOptions(str(model)), **options)


def _processor(tokenizer: Tokenizer | None, info: EngineInfo, options: EngineOptions) -> Processor:
    # The clock makes seeds differ from one start to the next unless the user fixed them.
    seed = options.seed if options.seed is not None else time.time_ns()
    return Processor(tokenizer, vocab_size=info.vocab_size, max_model_len=info.max_model_len, seed=seed)


def _raise_for(state: RequestState) -> None:
    reasons = {sequence.output.finish_reason for sequence in state.sequences.values()}
    if "error" in reasons:
        raise RequestError(state.error or "the request failed in the engine")
    if "deadline" in reasons:
        raise DeadlineExceededError("the request's deadline passed before it was done: allow more time or fewer tokens")


def _checked(state: RequestState) -> RequestOutput:
    _raise_for(state)
    return state.result()


def _beam_params(params: SamplingParams) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=1, logprobs=2 * params.num_sequences, ignore_eos=True, detokenize=False
    )


def _candidates(output: RequestOutput) -> Candidates:
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    ranked = sorted(logprobs[0].items(), key=lambda item: item[1].rank)
    return [(token_id, logprob.logprob) for token_id, logprob in ranked]


def _beam_output(
    beams: list[Beam],
    tokenizer: Tokenizer | None,
    params: SamplingParams,
    prompt: str | None,
    prompt_token_ids: list[int],
    num_cached_tokens: int,
) -> RequestOutput:
    outputs = []
    for index, beam in enumerate(beams):
        shown = (
            beam.token_ids[:-1]
            if beam.ended_by is not None and not params.include_stop_str_in_output
            else beam.token_ids
        )
        outputs.append(
            CompletionOutput(
                index=index,
                text=tokenizer.decode(shown, params.skip_special_tokens) if tokenizer is not None else "",
                token_ids=beam.token_ids,
                cumulative_logprob=beam.logprob,
                finish_reason="length" if beam.ended_by is None else "stop",
                stop_reason=beam.ended_by if beam.ended_by in params.stop_token_ids else None,
            )
        )
    return RequestOutput("", prompt, prompt_token_ids, outputs, True, num_cached_tokens=num_cached_tokens)
