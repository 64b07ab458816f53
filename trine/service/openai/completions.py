"""/v1/completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from trine.core.errors import RequestError, TrineError
from trine.llm.outputs import CompletionOutput, Delta
from trine.service.asgi import Request, Response
from trine.service.openai.decoding import RequestDecoder
from trine.service.openai.generation import Generation, together
from trine.service.openai.logprobs import CompletionLogprobsBuilder
from trine.service.openai.prompts import encode, split_prompts, truncate
from trine.service.openai.sampling import (
    check_stream_options,
    check_top_logprobs,
    deadline,
    guided_params,
    sampling_params,
)
from trine.service.openai.streaming import DONE, CompletionChunks, error_event
from trine.service.openai.structs.base import Usage
from trine.service.openai.structs.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)

if TYPE_CHECKING:
    from trine.llm.api import AsyncLLM, RequestStream
    from trine.llm.sampling.params import SamplingParams
    from trine.service.openai.context import Service

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 2048
_decoder = RequestDecoder(CompletionRequest)


@dataclass(slots=True)
class Job:
    """A checked request. `prompts` are texts and token ids, in order; `only_echo`: no generated token is wanted."""

    service: Service
    request: Request
    body: CompletionRequest
    engine: AsyncLLM
    params: SamplingParams
    prompts: list[tuple[str | None, list[int]]]
    with_usage: bool
    only_echo: bool
    generation: Generation

    def head(self) -> Completion:
        return Completion(
            id=f"cmpl-{self.generation.streams[0].request_id}",
            created=self.generation.created,
            model=self.body.model,
            choices=[],
            system_fingerprint=self.service.fingerprint,
        )

    def usage(self) -> Usage:
        """Without the token that was generated only because one must be."""
        if self.only_echo:
            self.generation.completion_tokens = [0]
        return self.generation.usage()

    def prompt_text(self, number: int) -> str:
        text, token_ids = self.prompts[number]
        return text if text is not None else self.service.tokenizer(self.engine).decode(token_ids)

    def logprobs_builder(self) -> CompletionLogprobsBuilder | None:
        if self.body.logprobs is None:
            return None
        return CompletionLogprobsBuilder(self.service.tokenizer(self.engine), self.body.logprobs)


async def completions(service: Service, request: Request) -> Response | None:
    """Continue one or many prompts; with echo and logprobs, also score them."""
    body = _decoder.decode(await request.body(service.settings.max_body_bytes))
    job = await prepare(service, request, body)
    try:
        job.generation.start(
            job.engine,
            [token_ids for _, token_ids in job.prompts],
            job.params,
            priority=body.priority,
            deadline=deadline(body),
        )
        async with request.cancelled_by_disconnect():
            if body.stream:
                await stream(job)
                return None
            return await answer(job)
    finally:
        job.generation.close()


async def prepare(service: Service, request: Request, body: CompletionRequest) -> Job:
    """Check the request and tokenise its prompts."""
    engine = service.language_model(body.model)
    if body.suffix:
        raise RequestError(
            "suffix is not supported: the models served here continue a text, they don't fill gaps; leave it out",
            param="suffix",
        )
    check_top_logprobs("logprobs", body.logprobs)
    only_echo = bool(body.echo) and body.max_tokens == 0
    params = sampling_params(
        body,
        max_tokens=1 if only_echo else DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        guided=guided_params(body, body.response_format),
        defaults=engine.info.sampling_defaults,
    )
    inputs = split_prompts(body.prompt, "prompt")
    if len(inputs) > MAX_PROMPTS:
        raise RequestError(f"prompt has {len(inputs)} prompts: give at most {MAX_PROMPTS}", param="prompt")
    special = body.add_special_tokens is not False
    prompts: list[tuple[str | None, list[int]]] = []
    for prompt in inputs:
        if isinstance(prompt, str):
            token_ids = await encode(service.tokenizer(engine), prompt, add_special_tokens=special)
        else:
            token_ids = prompt
        kept = truncate(token_ids, body.truncate_prompt_tokens, engine.max_model_len)
        prompts.append((prompt if isinstance(prompt, str) and kept is token_ids else None, kept))
    return Job(
        service=service,
        request=request,
        body=body,
        engine=engine,
        params=params,
        prompts=prompts,
        with_usage=check_stream_options(body),
        only_echo=only_echo,
        generation=Generation(service, request, len(prompts) * params.num_sequences),
    )


# --- whole ----------------------------------------------------------------------------------------------------------


async def answer(job: Job) -> Response:
    choices = []
    outputs = await job.generation.collect()
    for number, result in enumerate(outputs):
        for output in result.outputs:
            choices.append(_choice(job, number, output, number * job.params.n + output.index))
    completion = job.head()
    completion.choices = choices
    completion.usage = job.usage()
    return Response(msgspec.json.encode(completion))


def _choice(job: Job, number: int, output: CompletionOutput, index: int) -> CompletionChoice:
    """One sequence as a choice: with echo, the prompt goes in front."""
    text, token_ids, logprobs = output.text, output.token_ids, list(output.logprobs or [])
    if job.only_echo:
        text, token_ids, logprobs = "", [], []
    builder = job.logprobs_builder()
    scores = None
    if builder is not None:
        before = _echoed_logprobs(job, number, builder)
        scores = _joined(before, builder.build(token_ids, logprobs))
    if job.body.echo:
        text = job.prompt_text(number) + text
    by_length = job.only_echo or output.finish_reason == "length"
    return CompletionChoice(index=index, text=text, logprobs=scores, finish_reason="length" if by_length else "stop")


def _echoed_logprobs(job: Job, number: int, builder: CompletionLogprobsBuilder) -> CompletionLogprobs | None:
    if not job.body.echo:
        return None
    stream = job.generation.streams[number]
    return builder.build(stream.prompt_token_ids, stream.prompt_logprobs or [None] * len(stream.prompt_token_ids))


def _joined(first: CompletionLogprobs | None, second: CompletionLogprobs) -> CompletionLogprobs:
    if first is None:
        return second
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=None if first.top_logprobs is None else first.top_logprobs + (second.top_logprobs or []),
        text_offset=first.text_offset + second.text_offset,
    )


# --- streamed -------------------------------------------------------------------------------------------------------


class ChoiceStream:
    """One choice on its way out."""

    def __init__(self, job: Job, number: int, index: int, chunks: CompletionChunks) -> None:
        self._job = job
        self._number = number
        self._index = index
        self._chunks = chunks
        self._builder = job.logprobs_builder()
        self._echo = bool(job.body.echo)
        self._plain = not self._echo and self._builder is None

    def push(self, delta: Delta) -> bytes:
        """The events of one delta."""
        if self._plain and delta.finish_reason is None:
            return self._chunks.content(self._index, delta.text) if delta.text else b""
        if delta.finish_reason not in (None, "stop", "length") and not delta.text:
            return b""  # an error follows, which has a status of its own while nothing was sent
        out: list[bytes] = []
        if self._echo:
            self._echo = False
            scores = None if self._builder is None else _echoed_logprobs(self._job, self._number, self._builder)
            out.append(self._chunks.text(self._index, self._job.prompt_text(self._number), logprobs=scores))
        if not self._job.only_echo:
            if self._builder is not None and delta.logprobs:
                scores = self._builder.build(delta.token_ids, delta.logprobs)
                out.append(self._chunks.text(self._index, delta.text, logprobs=scores))
            elif delta.text:
                out.append(self._chunks.content(self._index, delta.text))
        if delta.finish_reason in ("stop", "length"):
            reason = "length" if self._job.only_echo else delta.finish_reason
            out.append(self._chunks.text(self._index, "", finish_reason=reason))
        return b"".join(out)


async def stream(job: Job) -> None:
    """Send events until every choice has ended. An error before the first is raised, later ones become an event."""
    generation, width = job.generation, job.params.n
    chunks = CompletionChunks(job.head(), len(job.prompts) * width, with_usage=job.with_usage)
    request = job.request

    async def one(number: int, source: RequestStream) -> None:
        first = number * width
        choices = {first + i: ChoiceStream(job, number, first + i, chunks) for i in range(width)}

        def events_of(deltas: list[Delta]) -> bytes:
            generation.account(deltas, first)
            return b"".join([choices[delta.index].push(delta) for delta in deltas])

        source.sink = request.event_sink(events_of)
        async for deltas in source:
            data = events_of(deltas)
            if not generation.unfinished:
                usage = job.usage()
                data += chunks.usage(usage) + DONE if job.with_usage else DONE
            if data:
                await request.write_events(data, generation.unfinished > 0)

    try:
        await together([one(number, source) for number, source in enumerate(generation.streams)])
    except TrineError as error:
        if not request.started:
            raise
        request.failure = error
        await request.write_events(error_event(error) + DONE, False)
