"""An engine as an instance: each request is a stream in it, from its tensors to its responses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

import numpy as np

from trine.core.errors import ModelLoadError, TrineError
from trine.llm.outputs import CompletionOutput, Delta, RequestOutput
from trine.server.backends.base import BatchDone, Respond
from trine.server.backends.llm.interface import ASKED_BY, TEXT_INPUT, TOKEN_INPUT, takes_tokens
from trine.server.backends.llm.requests import RequestReader, sampling_params, word_ids
from trine.server.configuration.types import datatype_name
from trine.server.errors import Code, ServerError
from trine.server.request import InferRequest, InferResponse
from trine.server.tensors import NUMPY_TYPES, Array, Tensor

if TYPE_CHECKING:
    from trine.llm.api import AsyncLLM, RequestStream
    from trine.llm.processor import Prompt
    from trine.llm.sampling.params import SamplingParams

logger = logging.getLogger("trine.server")

ModelConfig = Any

_CODES = {
    400: Code.INVALID_ARGUMENT,
    404: Code.NOT_FOUND,
    429: Code.UNAVAILABLE,
    503: Code.UNAVAILABLE,
    504: Code.UNAVAILABLE,
}
"""The engine's errors, by their HTTP status."""


class LlmInstance:
    """Begins requests in the engine. All of it runs in the event loop's thread."""

    unbounded = True

    def __init__(self, config: ModelConfig, engine: AsyncLLM, *, owned: bool, excludes: bool | None) -> None:
        self._name: str = config.name
        self._engine = engine
        self._owned = owned
        self._tokens = takes_tokens(config)
        self._batches = config.max_batch_size > 0
        self._decoupled: bool = config.model_transaction_policy.decoupled
        self._outputs = [(tensor.name, datatype_name(tensor.data_type), len(tensor.dims)) for tensor in config.output]
        # TensorRT-LLM's back end repeats the prompt unless it is told not to.
        self._excludes = excludes if excludes is not None else not self._tokens
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: dict[str, Answer] = {}

    @property
    def engine(self) -> AsyncLLM:
        """What computes: other protocols may send it requests too."""
        return self._engine

    async def start(self) -> None:
        """Load the model, if the engine is this instance's."""
        if not self._owned:
            return
        try:
            await self._engine.start()
        except ModelLoadError:
            raise
        except TrineError as error:
            raise ModelLoadError(f"model '{self._name}': {error.message}") from error

    async def is_ready(self) -> bool:
        return self._engine.is_ready

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._owned:
            await self._engine.close()

    def begin(self, requests: list[InferRequest], respond: Respond, done: BatchDone) -> None:
        """Begin streams: the engine has a queue of its own. The batch is over with the last of its requests."""
        left = set(map(id, requests))
        begun_ns = 0

        def answer(request: InferRequest, response: InferResponse) -> None:
            respond(request, response)
            if response.final and id(request) in left:
                left.discard(id(request))
                if not left and begun_ns:
                    done(begun_ns, monotonic_ns())

        for request in requests:
            try:
                self._begin(request, answer)
            except TrineError as error:
                answer(request, InferResponse(error=_server_error(error)))
            except Exception as error:
                logger.exception("model %s: a request can't be begun", self._name)
                failure = ServerError(f"{type(error).__name__}: {error}", Code.INTERNAL)
                answer(request, InferResponse(error=failure))
        begun_ns = monotonic_ns()
        if not left:
            done(begun_ns, begun_ns)

    def _begin(self, request: InferRequest, respond: Respond) -> None:
        if self._tokens and RequestReader(request, 0, self._batches).flag("stop"):
            self._stop(request, respond)
            return
        first = next(iter(request.inputs.values()))
        rows = first.shape[0] if self._batches else 1
        generations = [Generation(self, request, row, rows) for row in range(rows)]
        streams = []
        try:
            for generation in generations:
                streams.append(generation.start(self._engine))
        except TrineError:
            for stream in streams:
                stream.cancel()
            raise
        answer = Answer(self, request, respond, generations)
        if request.id:
            self._running[request.id] = answer
        answer.tasks = [self._task(answer.follow(generation)) for generation in generations]
        request.on_cancel = answer.cancel
        if request.cancelled:
            answer.cancel()

    def _stop(self, request: InferRequest, respond: Respond) -> None:
        """TensorRT-LLM's way to end a request early: another with the same id and `stop` set."""
        if not request.id:
            raise ServerError("Trying to stop a request but request ID is not provided", Code.INTERNAL)
        running = self._running.get(request.id)
        if running is not None:
            running.stop()
        respond(request, InferResponse())

    def _task(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def ended(self, answer: Answer) -> None:
        """A request has its final response, or is about to."""
        request = answer.request
        request.on_cancel = None
        if self._running.get(request.id) is answer:
            del self._running[request.id]

    def wanted(self, request: InferRequest, reader: RequestReader) -> list[tuple[str, str, int]]:
        """Name, datatype and rank of the outputs to send."""
        if request.outputs is not None:
            names = {output.name for output in request.outputs}
            return [output for output in self._outputs if output[0] in names]
        if self._tokens:
            return self._outputs
        return [output for output in self._outputs if output[0] not in ASKED_BY or reader.flag(ASKED_BY[output[0]])]


class Generation:
    """One row of a request: its prompt, how it is sampled, and the stream that computes it."""

    def __init__(self, instance: LlmInstance, request: InferRequest, row: int, rows: int) -> None:
        self.row = row
        self.reader = reader = RequestReader(request, row, instance._batches)
        self.streaming = reader.flag("streaming" if instance._tokens else "stream")
        if self.streaming and not instance._decoupled:
            raise ServerError(
                f"model '{instance._name}' can't stream: set model_transaction_policy {{ decoupled: true }} in its "
                "configuration"
            )
        self.outputs = instance.wanted(request, reader)
        names = {name for name, _, _ in self.outputs}
        self.logprobs = reader.flag("return_log_probs") or (
            not instance._tokens and bool(names & {"cumulative_logprob", "output_log_probs"})
        )
        excludes = reader.scalar("exclude_input_in_output", bool)
        self.excludes_input = instance._excludes if excludes is None else bool(excludes)
        self.prompt: Prompt = _token_prompt(reader) if instance._tokens else _text_prompt(reader)
        self.params = self._params(instance)
        self.stream: RequestStream | None = None
        self.deadline = request.deadline_ns
        self.id = f"{request.id}:{row}" if request.id and rows > 1 else None

    def _params(self, instance: LlmInstance) -> SamplingParams:
        params = sampling_params(self.reader, temperature_samples=not instance._tokens)
        if self.logprobs:
            params = params.replace(logprobs=0)
        if not instance._tokens:
            return params
        tokenizer = instance._engine.tokenizer
        if tokenizer is None:
            return params.replace(detokenize=False)
        return params.replace(
            stop=tuple(tokenizer.decode(ids) for ids in word_ids(self.reader, "stop_words_list")),
            bad_words=tuple(tokenizer.decode(ids) for ids in word_ids(self.reader, "bad_words_list")),
        )

    def start(self, engine: AsyncLLM) -> RequestStream:
        """Begin in the engine. TrineError where the request can't be served."""
        seconds = None if self.deadline is None else max(0.0, (self.deadline - monotonic_ns()) / 1e9)
        self.stream = engine.stream(self.prompt, self.params, deadline=seconds)
        return self.stream


class Answer:
    """Collects or streams what the rows of a request generate."""

    def __init__(
        self, instance: LlmInstance, request: InferRequest, respond: Respond, generations: list[Generation]
    ) -> None:
        self.request = request
        self.tasks: list[asyncio.Task[None]] = []
        self._instance = instance
        self._respond = respond
        self._generations = generations
        self._left = len(generations)
        self._results: dict[int, RequestOutput] = {}

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self._halt()
        self._instance.ended(self)
        self._respond(self.request, InferResponse(error=ServerError("Request cancelled", Code.CANCELLED)))

    def stop(self) -> None:
        """What there is so far is all there will be."""
        self._halt()
        if any(generation.streaming for generation in self._generations):
            self._instance.ended(self)
            self._respond(self.request, InferResponse())
            return
        for generation in self._generations:
            assert generation.stream is not None
            self._results.setdefault(generation.row, generation.stream.state.result())
        self._send_results()

    def _halt(self) -> None:
        for generation in self._generations:
            if generation.stream is not None:
                generation.stream.cancel()
        for task in self.tasks:
            task.cancel()

    async def follow(self, generation: Generation) -> None:
        """Until the row is done."""
        stream = generation.stream
        assert stream is not None
        try:
            if generation.streaming:
                await self._send_deltas(generation, stream)
            else:
                self._results[generation.row] = await stream.collect()
                self._left -= 1
                if not self._left:
                    self._send_results()
        except TrineError as error:
            self._fail(_server_error(error))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.exception("model %s: a response can't be made", self._instance._name)
            self._fail(ServerError(f"{type(error).__name__}: {error}", Code.INTERNAL))

    def _fail(self, error: ServerError) -> None:
        """The request ends; its other rows with it."""
        if self.request.done:
            return
        for generation in self._generations:
            if generation.stream is not None:
                generation.stream.cancel()
        self._instance.ended(self)
        self._respond(self.request, InferResponse(error=error))

    async def _send_deltas(self, generation: Generation, stream: RequestStream) -> None:
        unfinished = generation.params.n
        by_token = self._instance._tokens

        def sink(deltas: list[Delta]) -> bool:
            """Deltas that end nothing: sent without waking the task."""
            for delta in deltas:
                if delta.text or by_token:
                    self._send_delta(generation, stream, delta, final=False)
            return True

        stream.sink = sink
        async for deltas in stream:
            for delta in deltas:
                unfinished -= delta.finish_reason is not None
                final = not unfinished and self._left == 1
                if delta.text or by_token or delta.finish_reason is not None:
                    if final:
                        self._instance.ended(self)
                    self._send_delta(generation, stream, delta, final=final)
        self._left -= 1

    def _send_delta(self, generation: Generation, stream: RequestStream, delta: Delta, *, final: bool) -> None:
        chosen = None if delta.logprobs is None else _chosen(delta.token_ids, delta.logprobs)
        piece = CompletionOutput(
            delta.index,
            delta.text,
            delta.token_ids,
            sum(chosen) if chosen is not None else None,
            delta.logprobs,
            delta.finish_reason,
        )
        values = Values(generation, [piece], stream.prompt_token_ids, streaming=True)
        self._respond(self.request, InferResponse(self._tensors(generation, [values]), final=final))

    def _send_results(self) -> None:
        """One response with every row; with token ids and several rows, one each, as TensorRT-LLM's back end does."""
        rows = [
            Values(generation, self._results[generation.row].outputs, self._results[generation.row].prompt_token_ids)
            for generation in self._generations
        ]
        self._instance.ended(self)
        self._respond(self.request, InferResponse(self._tensors(self._generations[0], rows), final=True))

    def _tensors(self, generation: Generation, rows: Sequence[Values]) -> list[Tensor]:
        """The wanted outputs of these rows."""
        found = []
        for name, datatype, rank in generation.outputs:
            per_row = [values.array(name, rank, NUMPY_TYPES[datatype]) for values in rows]
            array = np.stack(_padded(per_row)) if self._instance._batches else per_row[0]
            found.append(Tensor(name, datatype, array.shape, array))
        return found


class Values:
    """The outputs of one row, by name."""

    def __init__(
        self,
        generation: Generation,
        sequences: list[CompletionOutput],
        prompt_token_ids: list[int],
        *,
        streaming: bool = False,
    ) -> None:
        self._generation = generation
        self._sequences = sequences
        self._prompt = prompt_token_ids
        self._repeats_input = not streaming and not generation.excludes_input

    def array(self, name: str, rank: int, dtype: np.dtype[Any]) -> Array:
        """An output's value in `rank` dimensions; zeros for what was not asked for."""
        make = getattr(self, f"_{name}", None)
        if make is None:
            return np.full((1,) * rank, b"" if dtype.kind == "O" else 0, dtype)
        return np.asarray(make(), dtype=dtype)

    def _text_output(self) -> Any:
        lead = ""
        if self._repeats_input:
            prompt = self._generation.prompt
            lead = prompt if isinstance(prompt, str) else ""
        texts = np.empty(len(self._sequences), dtype=object)
        texts[:] = [(lead + sequence.text).encode() for sequence in self._sequences]
        return texts

    def _finish_reason(self) -> Any:
        reasons = np.empty(len(self._sequences), dtype=object)
        reasons[:] = [(sequence.finish_reason or "").encode() for sequence in self._sequences]
        return reasons

    def _token_rows(self) -> list[list[int]]:
        lead = self._prompt if self._repeats_input else []
        return [[*lead, *sequence.token_ids] for sequence in self._sequences]

    def _output_ids(self) -> Any:
        return _rectangle(self._token_rows(), 0, np.int32)

    def _sequence_length(self) -> Any:
        return [len(row) for row in self._token_rows()]

    def _cum_log_probs(self) -> Any:
        return [sequence.cumulative_logprob or 0.0 for sequence in self._sequences]

    _cumulative_logprob = _cum_log_probs

    def _output_log_probs(self) -> Any:
        rows = [
            [0.0] * len(one.token_ids) if one.logprobs is None else _chosen(one.token_ids, one.logprobs)
            for one in self._sequences
        ]
        return _rectangle(rows, 0.0, np.float32)

    def _num_input_tokens(self) -> Any:
        return [len(self._prompt)]

    def _num_output_tokens(self) -> Any:
        return [len(sequence.token_ids) for sequence in self._sequences]

    def _batch_index(self) -> Any:
        return [self._generation.row]

    def _sequence_index(self) -> Any:
        return [self._sequences[0].index]


def _text_prompt(reader: RequestReader) -> str:
    texts = reader.array(TEXT_INPUT)
    if texts is None or texts.size != 1:
        raise ServerError(f"input '{TEXT_INPUT}' takes one string a request, got {0 if texts is None else texts.size}")
    item = texts.reshape(-1)[0]
    try:
        return item.decode() if isinstance(item, bytes) else str(item)
    except UnicodeDecodeError as error:
        raise ServerError(f"input '{TEXT_INPUT}' is not UTF-8: {error}") from None


def _token_prompt(reader: RequestReader) -> dict[str, list[int]]:
    ids = reader.array(TOKEN_INPUT)
    if ids is None:
        raise ServerError(f"input '{TOKEN_INPUT}' is missing: expected the prompt's token ids")
    length = reader.scalar("input_lengths", int)
    tokens = ids.reshape(-1).tolist()
    if length is not None and not 0 <= length <= len(tokens):
        raise ServerError(f"input_lengths={length}, but '{TOKEN_INPUT}' has {len(tokens)} token ids")
    return {"prompt_token_ids": tokens if length is None else tokens[:length]}


def _chosen(token_ids: list[int], logprobs: Any) -> list[float]:
    return [each[token_id].logprob for token_id, each in zip(token_ids, logprobs, strict=False)]


def _rectangle(rows: Sequence[Sequence[Any]], fill: Any, dtype: Any) -> Array:
    """Rows of different lengths as one array, filled up at the end."""
    array = np.full((len(rows), max(map(len, rows), default=0)), fill, dtype)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    return array


def _padded(arrays: list[Array]) -> list[Array]:
    """Arrays of one rank, each filled up to the largest size in every dimension."""
    if len({array.shape for array in arrays}) == 1:
        return arrays
    shape = tuple(max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True))
    padded = []
    for array in arrays:
        whole = np.full(shape, b"" if array.dtype == object else 0, array.dtype)
        whole[tuple(slice(size) for size in array.shape)] = array
        padded.append(whole)
    return padded


def _server_error(error: TrineError) -> ServerError:
    if isinstance(error, ServerError):
        return error
    return ServerError(error.message, _CODES.get(error.status, Code.INTERNAL))
