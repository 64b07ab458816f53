"""POST …/generate and …/generate_stream: plain JSON in and out, for models that take and give text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from trine.core.errors import TrineError
from trine.server.configuration.types import datatype_name
from trine.server.errors import ServerError, answerable
from trine.server.http.exchange import EVENTS, JSON, Exchange, error_body
from trine.server.http.values import array_values, decode_values, encode_list, parse_json
from trine.server.plan import InputPlan, Plan
from trine.server.request import InferResponse
from trine.server.single_answer import TracedCall
from trine.server.tensors import Tensor

if TYPE_CHECKING:
    from trine.server.http.api import HttpApi

_ONE_RESPONSE = (
    "generate expects model to produce exactly 1 response, use generate stream for model that generates various number "
    "of responses"
)


def generate(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    """One response, as one JSON object."""
    _start(api, exchange, name, version, GenerateCall)


def generate_stream(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    """Any number of responses, each a server-sent event."""
    _start(api, exchange, name, version, StreamCall)


def _start(api: HttpApi, exchange: Exchange, name: str, version: str, kind: type[GenerateCall]) -> None:
    model = api.repository.model(name, version)
    if exchange.headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        raise ServerError("Unsupported content-encoding, only 'identity' is supported.")
    document = parse_json(exchange.body)
    if not isinstance(document, dict):
        raise ServerError("the body of a generate request must be a JSON object")
    plan = Plan()
    plan.model_name, plan.model_version = name, version
    _read(plan, document, model.config)
    inputs = {planned.name: planned.tensor for planned in plan.inputs if planned.tensor is not None}
    call = kind(api, exchange, plan, model)
    request = plan.request(inputs, call.respond)
    api.prepare(request, exchange)
    call.trace(request)
    exchange.on_disconnect = request.cancel
    model.submit(request)


def _read(plan: Plan, document: dict[str, Any], config: Any) -> None:
    """Keys that name an input become tensors, the others parameters; those in `parameters` come one level up."""
    configured = {tensor.name: tensor for tensor in config.input}
    for key, value in document.items():
        tensor = configured.get(key)
        if tensor is not None:
            plan.add_input(_input(key, value, tensor, config.max_batch_size > 0))
        elif key == "id":
            if not isinstance(value, str):
                raise ServerError(f"Unable to parse 'id': it must be a string, got {value!r}")
            plan.id = value
        elif key == "parameters" and isinstance(value, dict):
            for inner, content in value.items():
                tensor = configured.get(inner)
                if tensor is not None:
                    plan.add_input(_input(inner, content, tensor, config.max_batch_size > 0))
                else:
                    plan.set_parameter(inner, content)
        else:
            plan.set_parameter(key, value)


def _input(name: str, value: Any, tensor: Any, batched: bool) -> InputPlan:
    """A scalar or a list, with as many dimensions as the model has."""
    values = value if isinstance(value, list) else [value]
    rank = max(len(tensor.dims) + batched, 1)
    shape = (1,) * (rank - 1) + (len(values),)
    datatype = datatype_name(tensor.data_type)
    return InputPlan(name, datatype, shape, tensor=decode_values(name, datatype, shape, values))


class GenerateCall(TracedCall):
    """A request on its way, answered by one JSON object."""

    __slots__ = ("_api", "_done", "_exchange", "_model", "_plan", "_responses")

    def __init__(self, api: HttpApi, exchange: Exchange, plan: Plan, model: Any) -> None:
        super().__init__()
        self._api = api
        self._exchange = exchange
        self._plan = plan
        self._model = model
        self._responses: list[InferResponse] = []
        self._done = False

    def respond(self, response: InferResponse) -> None:
        if self._done:
            return
        if not response.is_empty:
            self._responses.append(response)
        if response.error is None and not response.final:
            return
        self._done = True
        try:
            if response.error is not None:
                self._exchange.respond_error(response.error)
            elif len(self._responses) != 1:
                raise ServerError(_ONE_RESPONSE)
            else:
                self._exchange.respond(200, JSON, (self._encode(self._responses[0]),))
        except Exception as failure:
            self._exchange.respond_error(answerable(failure))
        self.finish_trace(self._api.traces)

    def _encode(self, response: InferResponse) -> bytes:
        """Outputs by name, one element as a scalar; keys in order."""
        fields: dict[str, str] = {
            "model_name": msgspec.json.encode(response.model_name or self._model.name).decode(),
            "model_version": msgspec.json.encode(response.model_version or self._model.version).decode(),
        }
        if self._plan.id:
            fields["id"] = msgspec.json.encode(self._plan.id).decode()
        for key, value in (response.parameters or {}).items():
            fields[key] = msgspec.json.encode(value).decode()
        for output in response.outputs:
            fields[output.name] = _encode(output)
        pairs = (f"{msgspec.json.encode(name).decode()}:{fields[name]}" for name in sorted(fields))
        return f"{{{','.join(pairs)}}}".encode()


def _encode(output: Tensor) -> str:
    values = array_values(output)
    text = encode_list(values, floating=output.datatype in ("FP16", "FP32", "FP64"))
    return text[1:-1] if len(values) == 1 else text


class StreamCall(GenerateCall):
    """A request on its way, answered by events. The status is decided by its first response."""

    __slots__ = ("_begun",)

    def __init__(self, api: HttpApi, exchange: Exchange, plan: Plan, model: Any) -> None:
        super().__init__(api, exchange, plan, model)
        self._begun = False

    def respond(self, response: InferResponse) -> None:
        if self._done:
            return
        exchange = self._exchange
        error: TrineError | None = response.error
        data = b""
        if error is None and not response.is_empty:
            try:
                data = self._encode(response)
            except Exception as failure:
                error = answerable(failure)
                if exchange.on_disconnect is not None:
                    exchange.on_disconnect()
        final = response.final or error is not None
        self._done = final
        if error is not None and not self._begun:
            exchange.respond_error(error)
            self.finish_trace(self._api.traces)
            return
        if not self._begun:
            self._begun = True
            exchange.begin(200, EVENTS)
        if error is not None:
            data = error_body(error.message)
        if data:
            exchange.write(b"data: %b\n\n" % data)
        if final:
            exchange.end()
            self.finish_trace(self._api.traces)
