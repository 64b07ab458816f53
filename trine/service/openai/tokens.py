"""/tokenize and /detokenize."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from trine.core.errors import RequestError
from trine.service.asgi import Request, Response
from trine.service.openai.decoding import RequestDecoder
from trine.service.openai.prompts import encode
from trine.service.openai.rendering import render
from trine.service.openai.structs.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)

if TYPE_CHECKING:
    from trine.service.openai.context import Service

_tokenize = RequestDecoder(TokenizeRequest)
_detokenize = RequestDecoder(DetokenizeRequest)


async def tokenize(service: Service, request: Request) -> Response:
    """Token ids of a text, or of a conversation as the model gets it."""
    body = _tokenize.decode(await request.body(service.settings.max_body_bytes))
    engine = service.language_model(body.model)
    tokenizer = service.tokenizer(engine)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    if body.messages is not None:
        text = await render(service, tokenizer, body, tools=body.tools)
        special = body.add_special_tokens is True
    else:
        assert body.prompt is not None
        text = body.prompt
        special = body.add_special_tokens is not False
    tokens = await encode(tokenizer, text, add_special_tokens=special)
    answer = TokenizeResponse(tokens=tokens, count=len(tokens), max_model_len=engine.max_model_len)
    if body.return_token_strs:
        answer.token_strs = [tokenizer.token_text(token) for token in tokens]
    return Response(msgspec.json.encode(answer))


async def detokenize(service: Service, request: Request) -> Response:
    """The text of token ids, special tokens included unless they are to be skipped."""
    body = _detokenize.decode(await request.body(service.settings.max_body_bytes))
    engine = service.language_model(body.model)
    tokenizer = service.tokenizer(engine)
    for token in body.tokens:
        if not 0 <= token < tokenizer.vocab_size:
            raise RequestError(
                f"tokens: id {token} is outside the vocabulary 0…{tokenizer.vocab_size - 1}", param="tokens"
            )
    text = tokenizer.decode(body.tokens, skip_special_tokens=bool(body.skip_special_tokens))
    return Response(msgspec.json.encode(DetokenizeResponse(prompt=text)))
