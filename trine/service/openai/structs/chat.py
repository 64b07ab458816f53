"""/v1/chat/completions on the wire."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, UnsetType, field

from trine.service.openai.structs.base import GenerationRequest, ResponseStruct, Usage, WireStruct

# --- messages -------------------------------------------------------------------------------------------------------


class TextPart(WireStruct, tag_field="type", tag="text", kw_only=True):
    text: str


class RefusalPart(WireStruct, tag_field="type", tag="refusal", kw_only=True):
    refusal: str


class ImagePart(WireStruct, tag_field="type", tag="image_url", kw_only=True):
    """Understood so that it can be refused by name: the models served take text."""

    image_url: dict[str, Any]


class AudioPart(WireStruct, tag_field="type", tag="input_audio", kw_only=True):
    """As `ImagePart`."""

    input_audio: dict[str, Any]


class FilePart(WireStruct, tag_field="type", tag="file", kw_only=True):
    """As `ImagePart`."""

    file: dict[str, Any]


ContentPart = TextPart | RefusalPart | ImagePart | AudioPart | FilePart
Content = str | list[ContentPart]


class FunctionCall(WireStruct, kw_only=True):
    """`arguments` is JSON text, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(WireStruct, kw_only=True):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | None = None


class SystemMessage(WireStruct, tag_field="role", tag="system", kw_only=True):
    content: Content
    name: str | None = None


class DeveloperMessage(WireStruct, tag_field="role", tag="developer", kw_only=True):
    """A system message under its newer name; templates see `system`."""

    content: Content
    name: str | None = None


class UserMessage(WireStruct, tag_field="role", tag="user", kw_only=True):
    content: Content
    name: str | None = None


class AssistantMessage(WireStruct, tag_field="role", tag="assistant", kw_only=True):
    """Takes back whatever a response's message holds, nulls included."""

    content: Content | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: FunctionCall | None = None
    reasoning_content: str | None = None
    audio: dict[str, Any] | None = None
    annotations: list[Any] | None = None
    parsed: Any = None


class ToolMessage(WireStruct, tag_field="role", tag="tool", kw_only=True):
    content: Content
    tool_call_id: str
    name: str | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage

# --- tools ----------------------------------------------------------------------------------------------------------


class FunctionDefinition(WireStruct, kw_only=True):
    """`parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(WireStruct, kw_only=True):
    function: FunctionDefinition
    type: Literal["function"] = "function"


class FunctionName(WireStruct, kw_only=True):
    name: str


class NamedTool(WireStruct, tag_field="type", tag="function", kw_only=True):
    function: FunctionName


class AllowedToolList(WireStruct, kw_only=True):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedTools(WireStruct, tag_field="type", tag="allowed_tools", kw_only=True):
    allowed_tools: AllowedToolList


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools

# --- response format ------------------------------------------------------------------------------------------------


class TextFormat(WireStruct, tag_field="type", tag="text", kw_only=True):
    pass


class JsonObjectFormat(WireStruct, tag_field="type", tag="json_object", kw_only=True):
    pass


class JsonSchema(WireStruct, kw_only=True):
    name: str
    schema_: dict[str, Any] | bool | None = field(default=None, name="schema")
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(WireStruct, tag_field="type", tag="json_schema", kw_only=True):
    json_schema: JsonSchema


class RegexFormat(WireStruct, tag_field="type", tag="regex", kw_only=True):
    """An extension: the output matches `regex` as a whole."""

    regex: str


class EbnfFormat(WireStruct, tag_field="type", tag="ebnf", kw_only=True):
    """An extension: the output belongs to the language of an EBNF grammar."""

    ebnf: str


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | EbnfFormat

# --- request --------------------------------------------------------------------------------------------------------


class ChatRequest(GenerationRequest, kw_only=True):
    """OpenAI's fields and, at the end, extensions about the chat template."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    # Accepted; they change nothing, or only how the prompt is written.
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    modalities: list[Literal["text"]] | None = None
    prediction: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    # Extensions.
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


# --- response -------------------------------------------------------------------------------------------------------


class TopLogprob(ResponseStruct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(ResponseStruct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(ResponseStruct, kw_only=True):
    content: list[TokenLogprob] | None
    refusal: None = None


class ResponseFunctionCall(ResponseStruct, kw_only=True):
    name: str
    arguments: str


class ResponseToolCall(ResponseStruct, kw_only=True):
    id: str
    function: ResponseFunctionCall
    type: Literal["function"] = "function"


class ResponseMessage(ResponseStruct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ResponseToolCall] | UnsetType = UNSET


FinishReasonName = Literal["stop", "length", "tool_calls", "content_filter"]


class ChatChoice(ResponseStruct, kw_only=True):
    index: int
    message: ResponseMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReasonName


class ChatCompletion(ResponseStruct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: str | None = None
    system_fingerprint: str
    metadata: dict[str, str] | UnsetType = UNSET


class DeltaFunction(ResponseStruct, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class DeltaToolCall(ResponseStruct, kw_only=True):
    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: DeltaFunction


class ChoiceDelta(ResponseStruct, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[DeltaToolCall] | UnsetType = UNSET


class ChunkChoice(ResponseStruct, kw_only=True):
    index: int
    delta: ChoiceDelta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReasonName | None = None


class ChatCompletionChunk(ResponseStruct, kw_only=True):
    """One `data:` line of a stream. `usage` is there with stream_options.include_usage only."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    service_tier: str | None = None
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
