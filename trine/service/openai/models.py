"""/v1/models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from trine.service.asgi import Request, Response
from trine.service.openai.errors import unknown_model
from trine.service.openai.structs.models import Model, ModelList

if TYPE_CHECKING:
    from trine.service.openai.context import Service


async def list_models(service: Service, request: Request) -> Response:
    """Every name that a request may give."""
    return Response(msgspec.json.encode(ModelList(data=served_models(service))))


async def get_model(service: Service, request: Request) -> Response:
    """One model, by name (slashes and all)."""
    name = request.path.removeprefix("/v1/models/")
    models = served_models(service)
    for model in models:
        if model.id == name:
            return Response(msgspec.json.encode(model))
    raise unknown_model(name, [model.id for model in models])


def served_models(service: Service) -> list[Model]:
    """The language model under each of its names, then the embedding model."""
    models = []
    info = service.info
    for name in service.model_names:
        engine = service.engine_named(name)
        if engine is not None and info is not None:
            length = engine.max_model_len if engine.is_ready else info.max_model_len
            models.append(Model(id=name, created=service.created, root=engine.options.model, max_model_len=length))
    if service.embedding is not None:
        for name in service.embedding_names:
            models.append(Model(id=name, created=service.created, root=service.settings.embedding_model or name))
    return models
