"""/v1/chat/completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from trine.core.errors import RequestError, TrineError
from trine.llm.chat.events import ContentDelta, Event, ReasoningDelta, ToolCallArguments, ToolCallStart
from trine.llm.outputs import CompletionOutput, Delta
from trine.service.asgi import Request, Response
from trine.service.openai.decoding import RequestDecoder
from trine.service.openai.generation import Generation
from trine.service.openai.logprobs import chat_logprobs
from trine.service.openai.parsing import OutputFormat, OutputParser, output_format
from trine.service.openai.prompts import encode, truncate
from trine.service.openai.rendering import render
from trine.service.openai.sampling import (
    check_stream_options,
    check_top_logprobs,
    deadline,
    guided_params,
    sampling_params,
)
from trine.service.openai.streaming import DONE, ChatChunks, error_event
from trine.service.openai.structs.chat import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    ChoiceDelta,
    ChoiceLogprobs,
    DeltaFunction,
    DeltaToolCall,
    FinishReasonName,
    ResponseFunctionCall,
    ResponseMessage,
    ResponseToolCall,
)

if TYPE_CHECKING:
    from trine.llm.api import AsyncLLM
    from trine.llm.sampling.params import SamplingParams
    from trine.llm.tokenizer import Tokenizer
    from trine.service.openai.context import Service

_decoder = RequestDecoder(ChatRequest)


@dataclass(slots=True)
class Job:
    """A checked request, tokenised."""

    service: Service
    request: Request
    body: ChatRequest
    engine: AsyncLLM
    tokenizer: Tokenizer
    params: SamplingParams
    prompt: str
    token_ids: list[int]
    format: OutputFormat
    with_usage: bool
    generation: Generation

    @property
    def id(self) -> str:
        return f"chatcmpl-{self.generation.streams[0].request_id}"

    @property
    def service_tier(self) -> str | None:
        return None if self.body.service_tier is None else "default"

    def parser(self) -> OutputParser | None:
        """A fresh parser for one choice; None when the text is the content as it stands."""
        return self.format.parser(self.prompt)

    def logprobs(self, token_ids: list[int], output: CompletionOutput | Delta) -> ChoiceLogprobs | None:
        """Of the tokens that are part of the text: not of the one that ended it."""
        if not self.body.logprobs or output.logprobs is None:
            return None
        count = len(token_ids)
        if output.finish_reason == "stop" and not isinstance(output.stop_reason, str):
            count -= not self.params.include_stop_str_in_output
        top = self.body.top_logprobs or 0
        return chat_logprobs(self.tokenizer, token_ids[:count], output.logprobs[:count], top)


async def chat_completions(service: Service, request: Request) -> Response | None:
    """Answer a conversation; with tools, call them; with a response_format, in it."""
    body = _decoder.decode(await request.body(service.settings.max_body_bytes))
    job = await prepare(service, request, body)
    try:
        job.generation.start(job.engine, [job.token_ids], job.params, priority=body.priority, deadline=deadline(body))
        async with request.cancelled_by_disconnect():
            if body.stream:
                await stream(job)
                return None
            return await answer(job)
    finally:
        job.generation.close()


async def prepare(service: Service, request: Request, body: ChatRequest) -> Job:
    """Check the request, write out its conversation and tokenise it."""
    engine = service.language_model(body.model)
    tokenizer = service.tokenizer(engine)
    check_top_logprobs("top_logprobs", body.top_logprobs)
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise RequestError("give max_completion_tokens or max_tokens (its older name), not both", param="max_tokens")
    guided = guided_params(body, body.response_format)
    format_ = output_format(service.settings, tokenizer, body, guided)
    tool_use = format_.tool_use
    if tool_use is not None and tool_use.forced is not None:
        guided = tool_use.forced
    params = sampling_params(
        body,
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        guided=guided,
        defaults=engine.info.sampling_defaults,
    )
    if format_.needs_special_tokens:
        params = params.replace(skip_special_tokens=False)
    tools = tool_use.shown if tool_use is not None else None
    prompt = await render(service, tokenizer, body, tools=tools)
    token_ids = await encode(tokenizer, prompt, add_special_tokens=False)
    return Job(
        service=service,
        request=request,
        body=body,
        engine=engine,
        tokenizer=tokenizer,
        params=params,
        prompt=prompt,
        token_ids=truncate(token_ids, body.truncate_prompt_tokens, engine.max_model_len),
        format=format_,
        with_usage=check_stream_options(body),
        generation=Generation(service, request, params.num_sequences),
    )


# --- whole ----------------------------------------------------------------------------------------------------------


async def answer(job: Job) -> Response:
    [result] = await job.generation.collect()
    completion = ChatCompletion(
        id=job.id,
        created=job.generation.created,
        model=job.body.model,
        choices=[_choice(job, output) for output in result.outputs],
        usage=job.generation.usage(),
        service_tier=job.service_tier,
        system_fingerprint=job.service.fingerprint,
    )
    if job.body.metadata is not None:
        completion.metadata = job.body.metadata
    return Response(msgspec.json.encode(completion))


def _choice(job: Job, output: CompletionOutput) -> ChatChoice:
    message = ResponseMessage(content=output.text)
    parser = job.parser()
    if parser is not None:
        message = _parsed_message([*parser.push(output.text), *parser.finish()])
    reason: FinishReasonName = "length" if output.finish_reason == "length" else "stop"
    if message.tool_calls and reason == "stop":
        reason = "tool_calls"
    return ChatChoice(
        index=output.index,
        message=message,
        logprobs=job.logprobs(output.token_ids, output),
        finish_reason=reason,
    )


def _parsed_message(events: list[Event]) -> ResponseMessage:
    """The events of one choice, put together as a client of the stream would."""
    content = "".join(event.text for event in events if isinstance(event, ContentDelta))
    reasoning = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
    calls: list[ResponseToolCall] = []
    for event in events:
        if isinstance(event, ToolCallStart):
            calls.append(ResponseToolCall(id=event.id, function=ResponseFunctionCall(name=event.name, arguments="")))
        elif isinstance(event, ToolCallArguments):
            calls[event.index].function.arguments += event.text
    message = ResponseMessage(content=content if content or not calls else None)
    if reasoning:
        message.reasoning_content = reasoning
    if calls:
        message.tool_calls = calls
    return message


# --- streamed -------------------------------------------------------------------------------------------------------


class ChoiceStream:
    """One choice on its way out: its role, then text, reasoning and tool calls as they come, then the finish reason."""

    def __init__(self, job: Job, index: int, chunks: ChatChunks) -> None:
        self._job = job
        self._index = index
        self._chunks = chunks
        self._parser = job.parser()
        self._plain = self._parser is None and not job.body.logprobs
        self._begun = False
        self._called = False

    def push(self, delta: Delta) -> bytes:
        """The events of one delta."""
        if self._plain and self._begun and delta.finish_reason is None:
            return self._chunks.content(self._index, delta.text) if delta.text else b""
        if delta.finish_reason not in (None, "stop", "length") and not delta.text:
            return b""  # an error follows, which has a status of its own while nothing was sent
        out: list[bytes] = []
        if not self._begun:
            self._begun = True
            out.append(self._chunks.delta(self._index, ChoiceDelta(role="assistant", content="")))
        scores = self._job.logprobs(delta.token_ids, delta)
        if self._parser is None and scores is None:
            if delta.text:
                out.append(self._chunks.content(self._index, delta.text))
        else:
            self._push_parsed(delta, scores, out)
        if delta.finish_reason in ("stop", "length"):
            reason = "tool_calls" if self._called and delta.finish_reason == "stop" else delta.finish_reason
            out.append(self._chunks.delta(self._index, ChoiceDelta(), finish_reason=reason))
        return b"".join(out)

    def _push_parsed(self, delta: Delta, scores: ChoiceLogprobs | None, out: list[bytes]) -> None:
        events: list[Event] = [ContentDelta(delta.text)] if self._parser is None and delta.text else []
        if self._parser is not None:
            events = self._parser.push(delta.text) if delta.text else []
            if delta.finish_reason is not None:
                events += self._parser.finish()
        for event in events:
            if type(event) is ContentDelta and scores is None:
                out.append(self._chunks.content(self._index, event.text))
                continue
            out.append(self._chunks.delta(self._index, self._wire_delta(event), logprobs=scores))
            scores = None  # once
        if scores is not None and scores.content:
            out.append(self._chunks.delta(self._index, ChoiceDelta(content=""), logprobs=scores))

    def _wire_delta(self, event: Event) -> ChoiceDelta:
        match event:
            case ContentDelta(text):
                return ChoiceDelta(content=text)
            case ReasoningDelta(text):
                return ChoiceDelta(reasoning_content=text)
            case ToolCallStart(index, id, name):
                self._called = True
                function = DeltaFunction(name=name, arguments="")
                return ChoiceDelta(tool_calls=[DeltaToolCall(index=index, id=id, type="function", function=function)])
            case ToolCallArguments(index, text):
                return ChoiceDelta(tool_calls=[DeltaToolCall(index=index, function=DeltaFunction(arguments=text))])


async def stream(job: Job) -> None:
    """Send events until every choice has ended. An error before the first is raised, a later one becomes an event."""
    generation = job.generation
    template = ChatCompletionChunk(
        id=job.id,
        created=generation.created,
        model=job.body.model,
        choices=[],
        service_tier=job.service_tier,
        system_fingerprint=job.service.fingerprint,
    )
    chunks = ChatChunks(template, job.params.n, with_usage=job.with_usage)
    choices = [ChoiceStream(job, index, chunks) for index in range(job.params.n)]
    request, source = job.request, generation.streams[0]

    def events_of(deltas: list[Delta]) -> bytes:
        generation.account(deltas, 0)
        return b"".join([choices[delta.index].push(delta) for delta in deltas])

    source.sink = request.event_sink(events_of)
    try:
        async for deltas in source:
            data = events_of(deltas)
            if not generation.unfinished:
                usage = generation.usage()
                data += chunks.usage(usage) + DONE if job.with_usage else DONE
            if data:
                await request.write_events(data, generation.unfinished > 0)
    except TrineError as error:
        if not request.started:
            raise
        request.failure = error
        await request.write_events(error_event(error) + DONE, False)
