"""ModelInfer and ModelStreamInfer."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from trine.core.errors import TrineError
from trine.server.errors import Code, ServerError, answerable
from trine.server.grpc import status
from trine.server.grpc.codec import stream_error, stream_response, tensors_of
from trine.server.grpc.stream import Buffer, CallError, Stream
from trine.server.plan import Plan
from trine.server.request import InferRequest, InferResponse
from trine.server.single_answer import SingleAnswer

if TYPE_CHECKING:
    from trine.server.grpc.service import GrpcApi


def grpc_status(error: TrineError) -> int:
    """The gRPC status of an error."""
    if isinstance(error, ServerError):
        return error.error_code.grpc_status
    return status.INVALID_ARGUMENT if error.status < 500 else status.INTERNAL


def infer(api: GrpcApi, stream: Stream, message: Buffer) -> None:
    """ModelInfer: one message, one answer."""
    try:
        plan, raws = api.decoder.decode(message)
        if api.repository.wants_load(plan.model_name):
            kept = bytes(message)
            api.repository.load_then(plan.model_name, lambda: infer(api, stream, kept))
            return
        model = find_model(api, plan.model_name, plan.model_version)
        if model.decoupled:
            raise ServerError(
                "ModelInfer RPC doesn't support models with decoupled transaction policy", Code.UNSUPPORTED
            )
        if plan.problem is not None:
            raise plan.problem
        call = InferCall(api, stream, plan, model)
        request = plan.request(tensors_of(plan, raws, api.memory), call.respond)
        request.deadline_ns = stream.deadline_ns
        api.prepare(request, stream)
        call.trace(request)
        stream.on_cancel = request.cancel
        model.submit(request)
    except TrineError as error:
        stream.on_cancel = None
        stream.finish(grpc_status(error), error.message)


def find_model(api: GrpcApi, name: str, version: str) -> Any:
    """The model of a request. ServerError: the version is no number, or there is no such model."""
    if version and not version.isdecimal():
        if version.removeprefix("-").isdecimal():
            raise ServerError(f"invalid model version specified '{version}' , version should be an integral value > 0")
        raise ServerError(
            f"failed to get model version from specified version string '{version}' (details: stol), version should be "
            "an integral value > 0"
        )
    return api.repository.model(name, version)


class InferCall(SingleAnswer):
    """A request on its way, and how to answer it."""

    __slots__ = ("_api", "_model", "_plan", "_stream")

    def __init__(self, api: GrpcApi, stream: Stream, plan: Plan, model: Any) -> None:
        super().__init__()
        self._api = api
        self._stream = stream
        self._plan = plan
        self._model = model

    def respond(self, response: InferResponse) -> None:
        answer = self.collect(response)
        if answer is None:
            return
        stream = self._stream
        stream.on_cancel = None
        try:
            if answer.error is not None:
                raise answer.error
            parts, length = self._api.encoder.encode(self._plan, self._model, answer)
            stream.reply(parts, length)
        except Exception as failure:
            told = answerable(failure)
            stream.finish(grpc_status(told), told.message)
        if self._traced is not None:
            self.finish_trace(self._api.traces)


class StreamSession:
    """ModelStreamInfer: requests and answers on one call.

    Answers of models that give one each leave in the order of the requests; decoupled models' leave as they come. An
    error is an answer and the stream lives on, unless its metadata asks for real ones (`triton_grpc_error: true`).
    """

    def __init__(self, api: GrpcApi, stream: Stream) -> None:
        self.api = api
        self.stream = stream
        self.real_errors = stream.metadata.get("triton_grpc_error", "").lower() == "true"
        self._open: set[StreamCall] = set()
        self._order: deque[StreamCall] = deque()
        self._half_closed = False
        self._loading = 0  # messages whose model is being loaded
        stream.on_message = self.message
        stream.on_half_close = self.half_close
        stream.on_cancel = self.cancel
        # Clients may wait for the head before they send anything.
        stream.send_head()

    def message(self, message: Buffer) -> None:
        self.stream.connection.consume(self.stream, len(message) + 5)
        self._take(message)

    def _take_loaded(self, message: Buffer) -> None:
        self._loading -= 1
        self._take(message)

    def _take(self, message: Buffer) -> None:
        plan: Plan | None = None
        try:
            plan, raws = self.api.decoder.decode(message)
            if self.api.repository.wants_load(plan.model_name):
                self._loading += 1
                self.api.repository.load_then(plan.model_name, partial(self._take_loaded, bytes(message)))
                return
            model = find_model(self.api, plan.model_name, plan.model_version)
            if plan.problem is not None:
                raise plan.problem
            call = StreamCall(self, plan, model)
            request = call.request = plan.request(tensors_of(plan, raws, self.api.memory), call.respond)
            request.deadline_ns = self.stream.deadline_ns
            self.api.prepare(request, self.stream)
        except Exception as failure:
            self.fail(answerable(failure), plan)
            return
        self._open.add(call)
        if not model.decoupled:
            self._order.append(call)
        try:
            model.submit(request)
        except Exception as failure:
            call.respond(InferResponse(error=as_server_error(answerable(failure))))

    def half_close(self) -> None:
        self._half_closed = True
        self._finish_if_done()

    def cancel(self) -> None:
        for call in list(self._open):
            if call.request is not None:
                call.request.cancel()

    def fail(self, error: TrineError, plan: Plan | None) -> None:
        """Answer a request that did not get far."""
        if self.real_errors:
            self.cancel()
            self.stream.finish(grpc_status(error), error.message)
            return
        data = stream_error(error.message, plan)
        if self._order:
            done = StreamCall(self, plan or Plan(), None)
            done.answers.append(((data,), len(data)))
            done.done = True
            self._order.append(done)
            self.release()
        else:
            self.stream.send((data,), len(data))

    def release(self) -> None:
        """Send what is next in order."""
        order = self._order
        while order and (order[0].answers or order[0].done):
            call = order[0]
            while call.answers:
                parts, length = call.answers.popleft()
                self.stream.send(parts, length)
            if not call.done:
                return
            order.popleft()

    def finished(self, call: StreamCall) -> None:
        self._open.discard(call)
        if call.request is not None:
            if call.request.trace is not None:
                self.api.traces.finish(call.request)
            call.request = None  # each held the other
        self._finish_if_done()

    def _finish_if_done(self) -> None:
        if self._half_closed and not self._loading and not self._open and not self._order:
            self.stream.finish()


class StreamCall:
    """One request of a stream."""

    __slots__ = ("_model", "_plan", "_session", "answers", "done", "request")

    def __init__(self, session: StreamSession, plan: Plan, model: Any) -> None:
        self._session = session
        self._plan = plan
        self._model = model
        self.answers: deque[tuple[Any, int]] = deque()
        self.done = False
        self.request: InferRequest | None = None

    def respond(self, response: InferResponse) -> None:
        if self.done:
            return
        session, plan = self._session, self._plan
        error: TrineError | None = response.error
        self.done = response.final or error is not None
        if error is None and (not response.is_empty or (plan.empty_final and response.final)):
            try:
                parts, length = session.api.encoder.encode(plan, self._model, response, final=response.final)
                self._answer(*stream_response(parts, length))
            except Exception as failure:
                error = answerable(failure)
                self.done = True
                if self.request is not None:
                    self.request.cancel()
        if error is not None:
            if session.real_errors:
                session.stream.on_cancel = None
                session.cancel()
                session.stream.finish(grpc_status(error), error.message)
            else:
                data = stream_error(error.message, plan)
                self._answer((data,), len(data))
        if not self._model.decoupled:
            session.release()
        if self.done:
            session.finished(self)

    def _answer(self, parts: Any, length: int) -> None:
        if self._model.decoupled:
            self._session.stream.send(parts, length)
        else:
            self.answers.append((parts, length))


def as_server_error(error: TrineError) -> ServerError:
    """The same for a response."""
    if isinstance(error, ServerError):
        return error
    return ServerError(error.message, Code.INVALID_ARGUMENT if error.status < 500 else Code.INTERNAL)


__all__ = ["CallError", "StreamSession", "as_server_error", "grpc_status", "infer"]
