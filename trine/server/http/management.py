"""Everything under /v2 but inference."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trine.server.describe import EXTENSIONS, message_to_dict, model_statistics, served
from trine.server.describe import model_metadata as describe_model
from trine.server.errors import Code, ServerError
from trine.server.http.exchange import JSON, TEXT, Exchange, error_body
from trine.server.http.values import parse_json
from trine.server.shared_memory import Kind, decode_handle
from trine.server.traffic import TrafficSplit

if TYPE_CHECKING:
    from trine.server.http.api import HttpApi

error_text = error_body
METRICS_TYPE = ((b"Content-Type", b"text/plain; version=0.0.4; charset=utf-8"),)


def document(exchange: Exchange) -> dict[str, Any]:
    """The body as a JSON object; an empty one is an empty object."""
    if not len(exchange.body):
        return {}
    found = parse_json(exchange.body)
    if not isinstance(found, dict):
        raise ServerError("the body of this request must be a JSON object")
    return found


def member(body: dict[str, Any], name: str, kind: type, what: str) -> Any:
    """A member of that type; ServerError says which is missing or wrong."""
    if name not in body:
        raise ServerError(f"{what} has no '{name}' field")
    value = body[name]
    if not isinstance(value, kind) or (isinstance(value, int) and (isinstance(value, bool) or value < 0)):
        expected = "a non-negative number" if kind is int else "a string" if kind is str else "an object"
        raise ServerError(f"'{name}' must be {expected}, got {value!r}")
    return value


# Health and metadata.


def live(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    exchange.respond(200 if api.repository.live else 400, TEXT)


def ready(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    exchange.respond(200 if api.repository.ready else 400, TEXT)


async def model_ready(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    if await api.repository.ask_ready(name, version):
        exchange.respond(200, TEXT)
    else:
        exchange.respond(400, TEXT, (b'{"error":"Model version not ready"}',))


def server_metadata(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    exchange.respond_json({"name": api.server_name, "version": api.server_version, "extensions": EXTENSIONS})


def model_metadata(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    exchange.respond_json(describe_model(api.repository.model(name, version), version))


def model_config(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    exchange.respond_json(message_to_dict(api.repository.model(name, version).config))


def statistics(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    exchange.respond_json(model_statistics(served(api.repository, name, version)))


def metrics(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    if api.exposition is None:
        raise ServerError("metrics are switched off: start the server with --allow-metrics=true", Code.UNAVAILABLE)
    exchange.respond(200, METRICS_TYPE, (api.exposition(),))


# The repository.


def repository_index(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    only_ready = document(exchange).get("ready", False)
    if not isinstance(only_ready, bool):
        raise ServerError(f"'ready' must be a boolean, got {only_ready!r}")
    entries = []
    for entry in api.repository.index(only_ready):
        described = {"name": entry.name}
        if entry.version:
            described["version"] = entry.version
        if entry.state:
            described["state"] = entry.state
        if entry.reason:
            described["reason"] = entry.reason
        entries.append(described)
    exchange.respond_json(entries)


async def repository_load(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    config: str | None = None
    files: dict[str, bytes] = {}
    for key, value in _parameters(exchange).items():
        if not isinstance(value, str):
            raise ServerError(f"parameter '{key}' of a load request must be a string")
        if key == "config":
            config = value
        elif key.startswith("file:"):
            try:
                files[key.removeprefix("file:")] = base64.b64decode(value, validate=True)
            except (binascii.Error, ValueError):
                raise ServerError(f"the content of '{key}' is not base64") from None
        else:
            raise ServerError(f"'{key}' is no parameter of a load request: use 'config' or 'file:<path>'")
    await api.repository.load(name, config, files or None)
    exchange.respond(200, JSON)


async def repository_unload(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    dependents = _parameters(exchange).get("unload_dependents", False)
    if not isinstance(dependents, bool):
        raise ServerError(f"'unload_dependents' must be a boolean, got {dependents!r}")
    await api.repository.unload(name, dependents)
    exchange.respond(200, JSON)


def _parameters(exchange: Exchange) -> dict[str, Any]:
    parameters = document(exchange).get("parameters", {})
    if not isinstance(parameters, dict):
        raise ServerError("'parameters' must be an object")
    return parameters


# What Triton does not have: traffic splits, and why a request took what it took.


def explain(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    exchange.respond_json({"requests": api.repository.explain(name)})


def traffic(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    api.repository.model(name)
    split = api.repository.traffic(name)
    exchange.respond_json(split.describe() if split is not None else {"weights": {}, "requests": {}})


def update_traffic(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    body = document(exchange)
    if body.get("rollback") is True:
        api.repository.roll_back_traffic(name)
        traffic(api, exchange, name, version)
        return
    weights = member(body, "weights", dict, "a traffic request")
    if not all(isinstance(weight, (int, float)) and not isinstance(weight, bool) for weight in weights.values()):
        raise ServerError(f'\'weights\' must be numbers by version, such as {{"1": 90, "2": 10}}, got {weights!r}')
    api.repository.set_traffic(name, TrafficSplit(weights) if weights else None)
    traffic(api, exchange, name, version)


# Shared memory.


def _status(kind: Kind) -> Callable[[HttpApi, Exchange, str, str], None]:
    def answer(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
        exchange.respond_json(api.memory.status(name or None, kind))

    return answer


def _unregister(kind: Kind) -> Callable[[HttpApi, Exchange, str, str], None]:
    def answer(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
        api.memory.unregister(name or None, kind)
        exchange.respond(200, JSON)

    return answer


system_status, cuda_status = _status("system"), _status("cuda")
system_unregister, cuda_unregister = _unregister("system"), _unregister("cuda")
_REGISTER = "Shared memory register request"


def _region_name(name: str, kind: Kind) -> str:
    if not name:
        raise ServerError(f"'region name' is necessary to register {kind} shared memory region")
    return name


def system_register(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    body = document(exchange)
    region = _region_name(name, "system")
    key = member(body, "key", str, _REGISTER)
    offset = member({"offset": 0, **body}, "offset", int, _REGISTER)
    api.memory.register_system(region, key, offset, member(body, "byte_size", int, _REGISTER))
    exchange.respond(200, JSON)


def cuda_register(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    body = document(exchange)
    region = _region_name(name, "cuda")
    handle = decode_handle(member(member(body, "raw_handle", dict, _REGISTER), "b64", str, "'raw_handle'"))
    device = member(body, "device_id", int, _REGISTER)
    api.memory.register_cuda(region, handle, device, member(body, "byte_size", int, _REGISTER))
    exchange.respond(200, JSON)


# Settings.


def _check_model(api: HttpApi, name: str) -> None:
    if name and not any(entry.name == name for entry in api.repository.index()):
        raise ServerError(f"Request for unknown model : {name}")


def trace_settings(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    _check_model(api, name)
    exchange.respond_json(api.trace_settings.describe(name))


def update_trace_settings(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    _check_model(api, name)
    api.trace_settings.update(name, document(exchange))
    exchange.respond_json(api.trace_settings.describe(name))


def log_settings(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    exchange.respond_json(api.log_settings.describe())


def update_log_settings(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    api.log_settings.update(document(exchange))
    exchange.respond_json(api.log_settings.describe())
