"""Every path of the service, in the order in which the documentation lists them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec

from trine.service.asgi import Request, Response
from trine.service.openai import chat, completions, embeddings, management, metrics, models, schema, tokens
from trine.service.openai.context import Service
from trine.service.openai.structs.chat import ChatCompletion, ChatCompletionChunk, ChatRequest
from trine.service.openai.structs.completions import Completion, CompletionRequest
from trine.service.openai.structs.embeddings import EmbeddingList, EmbeddingRequest
from trine.service.openai.structs.models import Health, LicenseInfo, Manifest, Metadata, Model, ModelList, Version
from trine.service.openai.structs.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)

Handler = Callable[[Service, Request], Awaitable[Response | None]]
"""Answers a request: a Response, or None when it has sent its answer itself. Raises TrineErrors."""
StructType = type[msgspec.Struct]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A method on a path. `event` is the struct of a stream's events. `{…}` at a path's end takes the rest of the path.

    needs_key: asks for a key when the service has any. inference: counts as work that draining waits for and refuses.
    """

    method: str
    path: str
    handler: Handler
    tag: str
    request: StructType | None = None
    response: StructType | None = None
    event: StructType | None = None
    needs_key: bool = False
    inference: bool = False
    media_type: str = "application/json"

    @property
    def summary(self) -> str:
        return (self.handler.__doc__ or "").strip().splitlines()[0]


def _inference(
    path: str,
    handler: Handler,
    request: StructType,
    response: StructType,
    event: StructType | None = None,
    tag: str = "Inference",
) -> Endpoint:
    return Endpoint("POST", path, handler, tag, request, response, event, needs_key=True, inference=True)


def _management(path: str, handler: Handler, response: StructType) -> Endpoint:
    return Endpoint("GET", path, handler, "Management", response=response)


ENDPOINTS: tuple[Endpoint, ...] = (
    _inference("/v1/chat/completions", chat.chat_completions, ChatRequest, ChatCompletion, ChatCompletionChunk),
    _inference("/v1/completions", completions.completions, CompletionRequest, Completion, Completion),
    _inference("/v1/embeddings", embeddings.embeddings, EmbeddingRequest, EmbeddingList),
    Endpoint("GET", "/v1/models", models.list_models, "Models", response=ModelList, needs_key=True),
    Endpoint("GET", "/v1/models/{model}", models.get_model, "Models", response=Model, needs_key=True),
    _inference("/tokenize", tokens.tokenize, TokenizeRequest, TokenizeResponse, tag="Tokens"),
    _inference("/detokenize", tokens.detokenize, DetokenizeRequest, DetokenizeResponse, tag="Tokens"),
    _management("/health", management.ready, Health),
    _management("/v1/health/live", management.live, Health),
    _management("/v1/health/ready", management.ready, Health),
    _management("/version", management.version, Version),
    _management("/v1/version", management.version, Version),
    _management("/v1/metadata", management.metadata, Metadata),
    _management("/v1/license", management.license_text, LicenseInfo),
    _management("/v1/manifest", management.manifest, Manifest),
    Endpoint("GET", "/metrics", metrics.metrics, "Management", media_type="text/plain"),
    Endpoint("GET", "/v1/metrics", metrics.bare_metrics, "Management", media_type="text/plain"),
    Endpoint("GET", "/openapi.json", schema.openapi, "Pages"),
    Endpoint("GET", "/docs", schema.docs, "Pages", media_type="text/html"),
    Endpoint("GET", "/", schema.playground, "Pages", media_type="text/html"),
)
