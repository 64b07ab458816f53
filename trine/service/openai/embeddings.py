"""/v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec

from trine.core.errors import RequestError
from trine.service.asgi import Request, Response
from trine.service.openai.decoding import RequestDecoder
from trine.service.openai.errors import unknown_model
from trine.service.openai.prompts import split_prompts
from trine.service.openai.structs.embeddings import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage

if TYPE_CHECKING:
    from trine.llm.embedding import EmbeddingModel
    from trine.service.openai.context import Service

MAX_INPUTS = 2048
_decoder = RequestDecoder(EmbeddingRequest)
_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trine-embedding")
"""One at a time: a batch already uses every core."""


async def embeddings(service: Service, request: Request) -> Response:
    """Vectors of texts, as numbers or as base64 of little-endian float32."""
    body = _decoder.decode(await request.body(service.settings.max_body_bytes))
    model = embedding_model(service, body.model)
    inputs = split_prompts(body.input, "input")
    if len(inputs) > MAX_INPUTS:
        raise RequestError(f"input has {len(inputs)} texts: give at most {MAX_INPUTS}", param="input")
    async with request.cancelled_by_disconnect():
        vectors, counts = await asyncio.get_running_loop().run_in_executor(
            _thread, lambda: model.embed(inputs, dimensions=body.dimensions)
        )
    as_base64 = body.encoding_format == "base64"
    data = [
        Embedding(
            index=index,
            embedding=base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_base64 else vector.tolist(),
        )
        for index, vector in enumerate(vectors)
    ]
    total = sum(counts)
    request.notes["prompt_tokens"] = total
    answer = EmbeddingList(
        data=data, model=service.embedding_names[0], usage=EmbeddingUsage(prompt_tokens=total, total_tokens=total)
    )
    return Response(msgspec.json.encode(answer))


def embedding_model(service: Service, name: str) -> EmbeddingModel:
    """The model that embeds under `name`; RequestError or model_not_found says what else there is."""
    if name in service.model_names and name not in service.embedding_names:
        raise RequestError(
            f"the model {name!r} does not embed: serve an encoder beside it with --embedding-model", param="model"
        )
    if name not in service.embedding_names:
        raise unknown_model(name, [*service.model_names, *service.embedding_names])
    service.check_ready()
    assert service.embedding is not None
    return service.embedding
