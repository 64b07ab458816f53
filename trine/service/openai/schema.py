"""/openapi.json, written from the wire structs, and /docs, a page that shows it without a network."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import msgspec

import trine
from trine.service.asgi import Request, Response
from trine.service.openai.structs.base import ErrorResponse

if TYPE_CHECKING:
    from trine.service.openai.context import Service
    from trine.service.openai.routes import Endpoint

HTML = b"text/html; charset=utf-8"
_ERRORS = {
    "400": "The request can't be right; the message says what to change.",
    "401": "A key is needed, or this one is not known.",
    "404": "No such model.",
    "413": "The body is too large.",
    "429": "The queue is full; see Retry-After.",
    "500": "A fault of the service.",
    "503": "Loading, restarting or shutting down; see Retry-After.",
}


async def openapi(service: Service, request: Request) -> Response:
    """This service's OpenAPI 3.1 document."""
    return Response(document())


async def docs(service: Service, request: Request) -> Response:
    """A page for people, made from /openapi.json in the browser."""
    return page("docs.html")


async def playground(service: Service, request: Request) -> Response:
    """A page to chat with the model."""
    return page("playground.html")


def page(name: str) -> Response:
    """A page of trine/service/web. It may load nothing from elsewhere."""
    policy = b"default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    headers = [(b"content-security-policy", policy), (b"cache-control", b"no-cache")]
    return Response(_file(name), content_type=HTML, headers=headers)


@functools.cache
def _file(name: str) -> bytes:
    return resources.files("trine.service.web").joinpath(name).read_bytes()


@functools.cache
def document() -> bytes:
    from trine.service.openai.routes import ENDPOINTS

    return msgspec.json.format(msgspec.json.encode(describe(ENDPOINTS)), indent=1)


def describe(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The OpenAPI document of `endpoints`."""
    types: list[Any] = [ErrorResponse]
    for endpoint in endpoints:
        types += [type_ for type_ in (endpoint.request, endpoint.response, endpoint.event) if type_ is not None]
    schemas, components = msgspec.json.schema_components(
        list(dict.fromkeys(types)), ref_template="#/components/schemas/{name}"
    )
    by_type = dict(zip(dict.fromkeys(types), schemas, strict=True))
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, by_type)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Trine",
            "version": trine.__version__,
            "description": "OpenAI's API on a model of your own. Fields that OpenAI does not have are extensions.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(endpoint: Endpoint, by_type: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if endpoint.response is not None:
        content["application/json"] = {"schema": by_type[endpoint.response]}
    if endpoint.event is not None:
        content["text/event-stream"] = {"schema": by_type[endpoint.event]}
    if not content:
        content[endpoint.media_type] = {"schema": {"type": "string"}}
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": re.sub(r"\W+", "_", f"{endpoint.method.lower()}{endpoint.path}").strip("_"),
        "tags": [endpoint.tag],
        "responses": {"200": {"description": "Done.", "content": content}},
    }
    for name in re.findall(r"\{(\w+)\}", endpoint.path):
        operation.setdefault("parameters", []).append(
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        )
    if endpoint.request is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": by_type[endpoint.request]}},
        }
    if endpoint.needs_key:
        operation["security"] = [{}, {"key": []}]
        error = {"application/json": {"schema": by_type[ErrorResponse]}}
        for status, text in _ERRORS.items():
            operation["responses"][status] = {"description": text, "content": error}
    return operation
