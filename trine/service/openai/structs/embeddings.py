"""/v1/embeddings on the wire."""

from __future__ import annotations

from typing import Literal

from trine.service.openai.structs.base import ResponseStruct, WireStruct


class EmbeddingRequest(WireStruct, kw_only=True):
    """`input`: a text, a list of texts, token ids, or a list of those. `input_type` is NIM's; the
    encoders served treat both alike.
    """

    input: str | list[str | int | list[int]]
    model: str
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    input_type: Literal["query", "passage"] | None = None


class Embedding(ResponseStruct, kw_only=True):
    """`embedding`: numbers, or with base64 the little-endian float32 bytes."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(ResponseStruct, kw_only=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(ResponseStruct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
