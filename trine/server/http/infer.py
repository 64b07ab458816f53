"""POST …/infer: JSON and binary tensors, raw requests, classification, compression, shared memory."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from trine.server.classification import classify, labels_of
from trine.server.configuration.types import datatype_name, item_size
from trine.server.errors import Code, ServerError, answerable
from trine.server.http.compression import accepted_encoding, compress, decompress
from trine.server.http.connection import too_large
from trine.server.http.exchange import JSON, Buffer, Exchange, HeaderBlock
from trine.server.http.values import decode_document, decode_values, encode_values
from trine.server.plan import InputPlan, OutputPlan, Plan, answered, classification_of, region_of
from trine.server.request import InferResponse
from trine.server.single_answer import SingleAnswer
from trine.server.tensors import Tensor

if TYPE_CHECKING:
    from trine.server.http.api import HttpApi

_LENGTH = b"inference-header-content-length"
_BINARY_HEADERS: dict[int, HeaderBlock] = {}


def infer(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    """Decode, submit; the answer follows when the model has it."""
    model = api.repository.model(name, version)
    if model.decoupled:
        raise DecoupledError
    body, headers = exchange.body, exchange.headers
    if b"content-encoding" in headers:
        body = _decompressed(api, exchange)
    given = headers.get(_LENGTH)
    if given is None:
        plan = plan_of(decode_document(body), name, version)
        tensors: Buffer = b""
    elif given.strip(b" \t") == b"0":
        plan = _raw_plan(model, name, version, len(body))
        tensors = _as_string(body) if plan.inputs[0].datatype == "BYTES" else body
    else:
        length = _json_length(given, len(body))
        view = memoryview(body)
        head = bytes(view[:length])
        tensors = view[length:]
        known = api.plans.values.get(head)
        if known is not None and known.model_name == name and known.model_version == version:
            plan = known
        else:
            plan = plan_of(decode_document(head), name, version)
            if all(planned.tensor is None for planned in plan.inputs):
                api.plans.add(head, plan)
    call = InferCall(api, exchange, plan, model)
    request = plan.request(_inputs(api, plan, tensors, name), call.respond)
    api.prepare(request, exchange)
    call.trace(request)
    exchange.on_disconnect = request.cancel
    model.submit(request)


class DecoupledError(ServerError):
    """A model with any number of responses, asked for one."""

    def __init__(self) -> None:
        super().__init__("HTTP end point doesn't support models with decoupled transaction policy", Code.UNSUPPORTED)


class InferCall(SingleAnswer):
    """A request on its way, and how to answer it."""

    __slots__ = ("_api", "_exchange", "_model", "_plan")

    def __init__(self, api: HttpApi, exchange: Exchange, plan: Plan, model: Any) -> None:
        super().__init__()
        self._api = api
        self._exchange = exchange
        self._plan = plan
        self._model = model

    def respond(self, response: InferResponse) -> None:
        answer = self.collect(response)
        if answer is None:
            return
        try:
            if answer.error is not None:
                self._exchange.respond_error(answer.error)
            else:
                self._answer(answer)
        except Exception as failure:
            self._exchange.respond_error(answerable(failure))
        finally:
            if self._traced is not None:
                self.finish_trace(self._api.traces)

    def _answer(self, response: InferResponse) -> None:
        plan, exchange = self._plan, self._exchange
        head, parts = encode_response(self._api, plan, self._model, response)
        length = len(head)
        encoding = exchange.headers.get(b"accept-encoding")
        if encoding is not None:
            chosen = accepted_encoding(encoding, binary=bool(parts))
            if chosen is not None:
                binary = (_LENGTH_NAME, str(length).encode()) if parts else None
                data = compress(b"".join((head, *parts)), chosen)
                kind = b"application/octet-stream" if parts else b"application/json"
                block: HeaderBlock = ((b"Content-Type", kind), (b"Content-Encoding", chosen))
                exchange.respond(200, (*block, binary) if binary else block, (data,))
                return
        if parts:
            exchange.respond(200, _binary_headers(length), (head, *parts))
        else:
            exchange.respond(200, JSON, (head,))


_LENGTH_NAME = b"Inference-Header-Content-Length"


def _binary_headers(length: int) -> HeaderBlock:
    found = _BINARY_HEADERS.get(length)
    if found is None:
        found = ((b"Content-Type", b"application/octet-stream"), (_LENGTH_NAME, str(length).encode()))
        if len(_BINARY_HEADERS) < 1024:
            _BINARY_HEADERS[length] = found
    return found


def _json_length(given: bytes, size: int) -> int:
    try:
        length = int(given)
    except ValueError:
        raise ServerError(
            f"Inference-Header-Content-Length must be a number, got {given.decode('latin-1')!r}"
        ) from None
    if not 0 < length <= size:
        raise ServerError(f"inference header size should be in range (0, {size}), got: {length}")
    return length


def _decompressed(api: HttpApi, exchange: Exchange) -> Buffer:
    kind = exchange.headers[b"content-encoding"].strip().lower()
    if kind in (b"identity", b""):
        return exchange.body
    try:
        body = decompress(exchange.body, kind, api.max_body)
    except zlib.error as error:
        raise ServerError(f"the body is not {kind.decode('latin-1')} data: {error}") from error
    if body is None:
        raise ServerError(too_large(api.max_body + 1, api.max_body))
    return body


# Documents to plans.


def plan_of(document: Any, name: str, version: str) -> Plan:
    """What the JSON of a request says. Raises ServerError."""
    plan = Plan()
    plan.model_name = name
    plan.model_version = version
    plan.id = document.id or ""
    if document.parameters:
        for key, value in document.parameters.items():
            plan.set_parameter(key, value)
    for tensor in document.inputs:
        plan.add_input(_input_plan(tensor))
    for output in document.outputs or ():
        plan.add_output(output.name, _output_plan(output))
    return plan


def _input_plan(tensor: Any) -> InputPlan:
    parameters = tensor.parameters or {}
    size = parameters.get("binary_data_size")
    region = region_of(parameters, f"input '{tensor.name}'") if parameters else None
    has_data = tensor.data is not msgspec.UNSET
    given = (size is not None) + (region is not None) + has_data
    if given != 1:
        which = "no field is set" if not given else "more than one is set"
        raise ServerError(
            "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
            f"'shared_memory_region' in 'parameters'. But {which}"
        )
    shape = tuple(tensor.shape)
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
        raise ServerError(f"'binary_data_size' of input '{tensor.name}' must be a number of bytes, got {size!r}")
    values = decode_values(tensor.name, tensor.datatype, shape, tensor.data) if has_data else None
    return InputPlan(tensor.name, tensor.datatype, shape, size=size, region=region, tensor=values)


def _output_plan(output: Any) -> OutputPlan:
    """`binary_data_output` of the request speaks of outputs that are not listed."""
    parameters = output.parameters
    if not parameters:
        return OutputPlan()
    wanted = parameters.get("binary_data", False)
    if not isinstance(wanted, bool):
        raise ServerError(f"'binary_data' of output '{output.name}' must be a boolean, got {wanted!r}")
    region = region_of(parameters, f"output '{output.name}'")
    return OutputPlan(classification=classification_of(parameters), binary=wanted, region=region)


def _raw_plan(model: Any, name: str, version: str, size: int) -> Plan:
    """A body that is the bytes of the only input."""
    config = model.config
    if len(config.input) != 1:
        raise ServerError(
            f"[request id: <id_unknown>] Raw request must only have 1 input (found 1) to be deduced but got "
            f"{len(config.input)} inputs in '{name}' model configuration"
        )
    tensor = config.input[0]
    datatype = datatype_name(tensor.data_type)
    shape = list(tensor.dims)
    if datatype == "BYTES":
        if any(dim not in (1, -1) for dim in shape) or len(shape) != 1:
            raise ServerError(f"a raw request needs an input of shape [1] for BYTES; '{tensor.name}' has {shape}")
        shape, size = [1], size + 4
    elif shape.count(-1) > 1:
        raise ServerError(f"a raw request can have one variable dimension; input '{tensor.name}' has {shape}")
    elif -1 in shape:
        other = item_size(datatype)
        for dim in shape:
            other *= dim if dim != -1 else 1
        if not other or size % other:
            raise ServerError(f"the {size} bytes of the raw request don't make up whole rows of input '{tensor.name}'")
        shape[shape.index(-1)] = size // other
    if config.max_batch_size > 0:
        shape.insert(0, 1)
    plan = Plan()
    plan.model_name, plan.model_version, plan.binary = name, version, True
    plan.add_input(InputPlan(tensor.name, datatype, tuple(shape), size=size))
    return plan


def _as_string(body: Buffer) -> bytes:
    return len(body).to_bytes(4, "little") + bytes(body)


# Tensors in and out.


def _inputs(api: HttpApi, plan: Plan, tensors: Buffer, model: str) -> dict[str, Tensor]:
    if not plan.plain:
        api.memory.check(plan)
    inputs: dict[str, Tensor] = {}
    position, end = 0, len(tensors)
    for planned in plan.inputs:
        size = planned.size
        if size is not None:
            stop = position + size
            if stop > end:
                raise ServerError(
                    f"unexpected size for input '{planned.name}', expecting {stop - end} additional bytes for model "
                    f"'{model}'"
                )
            part = tensors if size == end else tensors[position:stop]
            inputs[planned.name] = Tensor(planned.name, planned.datatype, planned.shape, None, part)
            position = stop
        elif planned.tensor is not None:
            inputs[planned.name] = planned.tensor
        else:
            assert planned.region is not None
            raw = api.memory.read(planned.region)
            inputs[planned.name] = Tensor(planned.name, planned.datatype, planned.shape, None, raw)
    if position != end:
        raise ServerError(f"unexpected additional input data for model '{model}'")
    return inputs


_quoted: dict[str, str] = {}


def quote(text: str) -> str:
    """A JSON string. Names of models and tensors come again and again."""
    found = _quoted.get(text)
    if found is None:
        found = msgspec.json.encode(text).decode()
        if len(_quoted) < 4096 and len(text) < 256:
            _quoted[text] = found
    return found


def encode_response(api: HttpApi, plan: Plan, model: Any, response: InferResponse) -> tuple[bytes, Sequence[Buffer]]:
    """The JSON of an answer, and the binary tensors that follow it."""
    binary: list[Buffer] = []
    texts: list[str] = []
    outputs: Sequence[Tensor] = answered(plan, response.outputs)
    answers = plan.answers
    for output in outputs:
        wanted = answers.get(output.name)
        if wanted is not None and wanted.classification:
            labels = labels_of(api.repository, model, output.name)
            output = classify(output, wanted.classification, labels, batched=model.config.max_batch_size > 0)
        shape = ",".join(map(str, output.shape))
        start = f'{{"name":{quote(output.name)},"datatype":"{output.datatype}","shape":[{shape}]'
        if wanted is not None and wanted.region is not None:
            api.memory.write(wanted.region, output.raw, output.name)
            texts.append(start + "}")  # clients take any parameters for those of binary data
        elif wanted.binary if wanted is not None else plan.binary:
            raw = output.raw
            binary.append(raw)
            texts.append(f'{start},"parameters":{{"binary_data_size":{len(raw)}}}}}')
        else:
            texts.append(f'{start},"data":{encode_values(output)}}}')
    id_text = f'"id":{quote(plan.id)},' if plan.id else ""
    parameters = ""
    if response.parameters:
        parameters = f'"parameters":{msgspec.json.encode(response.parameters).decode()},'
    head = (
        f'{{{id_text}"model_name":{quote(response.model_name or model.name)},'
        f'"model_version":{quote(response.model_version or model.version)},{parameters}"outputs":[{",".join(texts)}]}}'
    )
    return head.encode(), binary
