"""A model's process: load `TritonPythonModel`, execute batches until told to finish."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import importlib.util
import inspect
import json
import os
import signal
import sys
import threading
from collections.abc import Coroutine
from types import ModuleType
from typing import Any

from trine.server.backends.python import wire
from trine.server.backends.python.stub import connection as wires
from trine.server.backends.python.stub import utils
from trine.server.backends.python.stub.connection import Connection
from trine.server.backends.python.stub.errors import TritonModelException, describe
from trine.server.backends.python.stub.inference import (
    RELEASE_RESCHEDULE,
    InferenceRequest,
    InferenceResponse,
    ModelIdentity,
)

_NO_CONFIGURATION: dict[str, Any] = {}


def run(main: int, side: int, incoming: int, outgoing: int) -> None:
    """The process's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when its models end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # a model that takes all memory goes before the server does
    for name in ("triton_python_backend_utils", "c_python_backend_utils"):
        sys.modules[name] = utils
    connection = wires.connection = Connection(main, side, incoming, outgoing)
    connection.start()
    connection.send(wire.HELLO)
    message = connection.receive()
    if message is not None and message[0] == wire.INITIALIZE:
        arguments = message[1]
        if arguments["complete"]:
            _complete(connection, arguments)
        else:
            _serve(connection, arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # not held up by threads that the model left


def _complete(connection: Connection, arguments: dict[str, Any]) -> None:
    """Run `auto_complete_config` and send the configuration that it returns."""
    try:
        model = load_class(arguments["file"], arguments["version"])
        result = None
        if hasattr(model, "auto_complete_config"):
            config = model.auto_complete_config(utils.ModelConfig(arguments["config"]))
            if not isinstance(config, utils.ModelConfig):
                raise TritonModelException(
                    f"auto_complete_config returned {type(config).__name__}: return the ModelConfig that it was given"
                )
            result = json.dumps(config.as_dict())
    except BaseException as error:
        connection.send(wire.FAILED, describe(error))
    else:
        connection.send(wire.READY, False, result)
    connection.receive()  # wait for the end, so that nothing sent is lost


def _serve(connection: Connection, arguments: dict[str, Any]) -> None:
    try:
        runner = Runner(connection, arguments)
    except BaseException as error:
        connection.send(wire.FAILED, describe(error))
        connection.receive()
        return
    runner.run()


def load_class(file: str, version: str) -> Any:
    """The class TritonPythonModel of a model's file, imported as VERSION.model so that it can import its neighbours."""
    directory = os.path.dirname(file)
    stem = os.path.splitext(os.path.basename(file))[0]
    if os.path.basename(directory) == version:
        sys.path += [directory, os.path.dirname(directory)]
        module = _import_from(file, f"{version}.{stem}", directory)
    else:
        sys.path.append(directory)
        module = _import_from(file, stem, None)
    try:
        return module.TritonPythonModel
    except AttributeError:
        raise TritonModelException(
            f"{file} defines no class TritonPythonModel: the model's class has to have that name"
        ) from None


def _import_from(file: str, name: str, package_directory: str | None) -> ModuleType:
    """Import exactly `file`, whatever else of its name the module search path holds."""
    if package_directory is not None:
        package = ModuleType(name.rpartition(".")[0])
        package.__path__ = [package_directory]
        sys.modules[package.__name__] = package
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise TritonModelException(f"{file} is not a Python file: name it *.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Runner:
    """The model, and the loop that executes what comes."""

    def __init__(self, connection: Connection, arguments: dict[str, Any]) -> None:
        self._connection = connection
        self._instance_name: str = arguments["instance"]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_lock = threading.Lock()
        model_class = load_class(arguments["file"], arguments["version"])
        self._model = model_class()
        config = json.loads(arguments["config"])
        self._identity = ModelIdentity(
            arguments["name"],
            int(arguments["version"]),
            [output["name"] for output in config.get("output", [])],
            bool(config.get("model_transaction_policy", {}).get("decoupled", False)),
        )
        if hasattr(self._model, "initialize"):
            self._model.initialize(
                {
                    "model_config": arguments["config"],
                    "model_instance_kind": arguments["kind"],
                    "model_instance_device_id": str(arguments["device"]),
                    "model_repository": arguments["directory"],
                    "model_version": arguments["version"],
                    "model_name": arguments["name"],
                }
            )
        if not hasattr(self._model, "execute"):
            raise TritonModelException(f"Python model {arguments['file']} does not implement `execute` method.")
        gc.collect()
        gc.freeze()  # what loading made stays: later collections need not look at it

    def run(self) -> None:
        """Until the server says so, or is gone."""
        connection = self._connection
        has_readiness = hasattr(self._model, "is_ready")
        if has_readiness:
            connection.on_readiness = self._on_readiness
        connection.accepts_bls = True
        connection.send(wire.READY, has_readiness, None)
        while (message := connection.receive()) is not None and message[0] != wire.FINALIZE:
            self._execute(message[1], message[2])
            del message  # and with it the tensors that the model did not keep
        self._finalize()
        if message is not None:
            connection.send(wire.FINALIZED)

    def _finalize(self) -> None:
        self._connection.accepts_bls = False
        if hasattr(self._model, "finalize"):
            try:
                self._model.finalize()
            except Exception as error:
                self._log(f"finalize of '{self._instance_name}' failed: {describe(error)}")

    def _execute(self, block: wire.Block, messages: list[wire.Message]) -> None:
        """Execute a batch and answer it. Whatever the model raises becomes its requests' error."""
        content = self._connection.content_of(block)
        requests = [InferenceRequest._of_message(message, content, self._identity) for message in messages]
        try:
            returned = self._model.execute(requests)
            if inspect.iscoroutine(returned):
                if self._identity.decoupled:
                    self._run_in_background(returned, requests)
                    self._connection.send(wire.DONE, wire.NO_BLOCK, None, None)
                    return
                returned = self._run_coroutine(returned)
            if returned is None:
                self._done_without_responses(requests)
            else:
                self._respond(requests, returned)
        except BaseException as error:  # sys.exit() too: the model's process is not its own to end
            self._fail(requests, error)

    def _respond(self, requests: list[InferenceRequest], returned: Any) -> None:
        """Send what `execute` returned, in one message. TritonModelException where it is not what it has to be."""
        self._check_list(requests, returned)
        packer = wire.Packer()
        each: list[Any] = []
        for request, response in zip(requests, returned, strict=True):
            if response is None:
                each.append(_unanswered(request))
            elif request._release_flags == RELEASE_RESCHEDULE:
                raise TritonModelException(
                    "Expected a None object in the execute function return list for reschduled request, found type "
                    f"'{type(response)}'."
                )
            elif not isinstance(response, InferenceResponse):
                raise TritonModelException(
                    "Expected an 'InferenceResponse' object in the execute function return list, found type "
                    f"'{type(response)}'."
                )
            else:
                each.append(request._answer(response, packer))
        self._connection.send_packed(packer, lambda block: (wire.DONE, block, each, None))

    def _check_list(self, requests: list[InferenceRequest], returned: Any) -> None:
        if self._identity.decoupled:
            raise TritonModelException(
                f"Python model '{self._instance_name}' is using the decoupled mode and the execute function must "
                "return None."
            )
        if not isinstance(returned, list | tuple):
            raise TritonModelException(f"Expected a list in the execute return, found type '{type(returned)}'.")
        if len(returned) != len(requests):
            raise TritonModelException(
                "Number of InferenceResponse objects do not match the number of InferenceRequest objects. "
                f"InferenceRequest(s) size is:{len(requests)}, and InferenceResponse(s) size is:{len(returned)}\n"
            )

    def _done_without_responses(self, requests: list[InferenceRequest]) -> None:
        """Every request is answered by its sender, or is to be executed again."""
        each = [_unanswered(request) for request in requests]
        self._connection.send(wire.DONE, wire.NO_BLOCK, each if any(each) else None, None)

    def _fail(self, requests: list[InferenceRequest], error: BaseException) -> None:
        text = f"Failed to process the request(s) for model '{self._instance_name}', message: {describe(error)}"
        for request in requests:
            request.get_response_sender()._close()
        self._connection.send(wire.DONE, wire.NO_BLOCK, None, text)

    # --- coroutines: an event loop in a thread of its own, shared by all batches ------------------------------------

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        with self._loop_lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="coroutines", daemon=True).start()
        return self._loop

    def _run_coroutine(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._event_loop()).result()

    def _run_in_background(self, coroutine: Coroutine[Any, Any, Any], requests: list[InferenceRequest]) -> None:
        async def watch() -> None:
            try:
                returned = await coroutine
                if returned is not None:
                    self._check_list(requests, returned)
            except BaseException as error:
                self._fail_each(requests, error)

        asyncio.run_coroutine_threadsafe(watch(), self._event_loop())

    def _fail_each(self, requests: list[InferenceRequest], error: BaseException) -> None:
        """A batch whose instance goes on with others has failed: its open requests end with the error."""
        text = f"Failed to process the request(s) for model '{self._instance_name}', message: {describe(error)}"
        self._log(text)
        response = InferenceResponse(error=utils.TritonError(text))
        for request in requests:
            with contextlib.suppress(TritonModelException):  # it was closed already
                request.get_response_sender().send(response, utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    # --- readiness: in a thread of its own, so that answers to other calls are not held up ---------------------------

    def _on_readiness(self, call: int) -> None:
        threading.Thread(target=self._answer_readiness, args=(call,), name="is_ready", daemon=True).start()

    def _answer_readiness(self, call: int) -> None:
        try:
            ready = self._model.is_ready()
            if inspect.iscoroutine(ready):
                ready = self._run_coroutine(ready)
            if not isinstance(ready, bool):
                raise TritonModelException(f"is_ready() must return a boolean, found type '{type(ready).__name__}'")
        except BaseException as error:
            self._log(f"is_ready of '{self._instance_name}' failed: {describe(error)}")
            ready = False
        self._connection.send(wire.READINESS, call, ready)

    def _log(self, text: str) -> None:
        utils.Logger.log_error(text)


def _unanswered(request: InferenceRequest) -> int | None:
    """What stands for a response that `execute` did not return."""
    if request._release_flags != RELEASE_RESCHEDULE:
        request._abandon()
        return None
    request.get_response_sender()._close()
    return wire.RESCHEDULED
