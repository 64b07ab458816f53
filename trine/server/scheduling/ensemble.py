"""Ensembles: a request runs through a graph of models. Steps whose tensors are there run side by side.

Every response of a decoupled member opens a scope of its own, in which the steps behind it run once; a scope sees the
tensors of those around it. Responses leave in the order in which the scopes were opened.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from trine.core.errors import ModelLoadError
from trine.server.answers import Answers
from trine.server.errors import Code, ServerError
from trine.server.request import InferRequest, InferResponse, Parameter, RequestedOutput
from trine.server.scheduling.graph import Graph, Step
from trine.server.tensors import Tensor

if TYPE_CHECKING:
    from trine.server.repository import Repository

ModelConfig = Any


class EnsembleScheduler:
    """Sends a request's tensors through the members. There is no queue: members have theirs."""

    def __init__(self, config: ModelConfig, repository: Repository, answers: Answers) -> None:
        self.repository = repository
        self.answers = answers
        self.batches: bool = config.max_batch_size > 0
        self.graph = Graph(config, self._member_config)
        self.decoupled = self.graph.decoupled
        self.limit: int = config.ensemble_scheduling.max_inflight_requests
        self._runs: set[Run] = set()
        self._wanted = {step.index: [RequestedOutput(name) for name in step.outputs] for step in self.graph.steps}

    def __len__(self) -> int:
        return 0

    def _member_config(self, name: str, version: str) -> ModelConfig:
        try:
            model = self.repository.model(name, version)
        except ServerError as error:
            raise ModelLoadError(
                f"ensemble {self.answers.name} depends on '{name}' which has no loaded version"
                f"{f' {version}' if version else ''}: {error.message}"
            ) from error
        if model.decoupled == model.config.model_transaction_policy.decoupled:
            return model.config
        config = type(model.config)()  # an ensemble with a decoupled member is decoupled, whatever it says
        config.CopyFrom(model.config)
        config.model_transaction_policy.decoupled = model.decoupled
        return config

    def wanted(self, step: Step) -> list[RequestedOutput]:
        """What a step's member is asked for."""
        return self._wanted[step.index]

    def enqueue(self, request: InferRequest) -> None:
        self.answers.begin()
        run = Run(self, request)
        self._runs.add(run)
        run.start()

    def ended(self, run: Run) -> None:
        self._runs.discard(run)

    def reject_all(self, error: ServerError) -> None:
        """End everything that runs."""
        for run in list(self._runs):
            run.fail(error)


class Scope:
    """Tensors and what is still to run, for one pass through a part of the graph."""

    __slots__ = ("done", "left", "outer", "running", "source", "started", "tensors")

    def __init__(self, outer: Scope | None, source: Step | None, left: list[Step]) -> None:
        self.outer = outer
        self.source = source
        self.left = left
        self.started: list[Step] = []
        self.running = 0
        self.tensors: dict[str, Tensor | None] = {}
        self.done = False

    def find(self, name: str) -> tuple[bool, Tensor | None]:
        """Whether the tensor is known here or around, and its value: None where it is known to be absent."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.tensors:
                return True, scope.tensors[name]
            scope = scope.outer
        return False, None


class Run:
    """One request on its way through the graph."""

    def __init__(self, scheduler: EnsembleScheduler, request: InferRequest) -> None:
        self._scheduler = scheduler
        self._request = request
        graph = scheduler.graph
        names = list(graph.outputs) if request.outputs is None else [output.name for output in request.outputs]
        self._names = names
        self._steps = graph.needed(names)
        self._root = Scope(None, None, [step for step in self._steps if step.stream is None])
        self._root.tensors.update(dict.fromkeys(graph.inputs))
        self._root.tensors.update(request.inputs)
        self._innermost = self._find_innermost()
        self._leaves: deque[Scope] = deque()
        self._scopes: list[Scope] = [self._root]
        self._waiting: deque[Scope] = deque()
        self._members: set[InferRequest] = set()
        self._ended = False

    def _find_innermost(self) -> Step | None:
        """The decoupled step whose every response makes one of the ensemble's; None: the ensemble answers once."""
        sources = [step for step in self._steps if step.decoupled]
        return max(sources, key=lambda step: len(step.ancestors), default=None)

    def start(self) -> None:
        self._request.on_cancel = self._cancel
        if self._innermost is None:
            self._leaves.append(self._root)
        self._advance(self._root)
        self._settle()

    def _cancel(self) -> None:
        self.fail(ServerError("Request cancelled", Code.CANCELLED))

    def fail(self, error: ServerError) -> None:
        """End the request with an error, and what runs for it."""
        if self._ended:
            return
        self._end(InferResponse(error=error))
        for member in list(self._members):
            member.cancel()

    def _end(self, response: InferResponse) -> None:
        self._ended = True
        self._request.on_cancel = None
        self._scheduler.ended(self)
        self._scheduler.answers.end(self._request, response)

    def _advance(self, scope: Scope) -> None:
        """Start the steps of a scope whose tensors are known."""
        for step in [step for step in scope.left if all(scope.find(name)[0] for name in step.inputs.values())]:
            if self._ended:
                return
            if step not in scope.left:  # an answer that came at once has started it meanwhile
                continue
            scope.left.remove(step)
            scope.running += 1
            self._begin(scope, step)

    def _begin(self, scope: Scope, step: Step) -> None:
        scheduler, request = self._scheduler, self._request
        try:
            model = scheduler.repository.model(step.model, step.version)
            inputs = {}
            for name, source in step.inputs.items():
                tensor = scope.find(source)[1]
                if tensor is not None:
                    inputs[name] = _fitted(tensor.renamed(name), step.config, step.config.input)
            member = InferRequest(
                step.model,
                inputs,
                _unset,
                model_version=step.version,
                id=request.id,
                outputs=scheduler.wanted(step),
                parameters=request.parameters,
                priority=request.priority,
                timeout_us=request.timeout_us,
                sequence_id=request.sequence_id,
                sequence_start=request.sequence_start,
                sequence_end=request.sequence_end,
                deadline_ns=request.deadline_ns,
            )
            member.internal = True
            member.context = request.context
            member.respond = partial(self._answered, scope, step, member)
            self._members.add(member)
            if request.trace is not None:
                request.trace.start_member(member)
            model.submit(member)
        except ServerError as error:
            self.fail(error)

    def _answered(self, scope: Scope, step: Step, member: InferRequest, response: InferResponse) -> None:
        """A member has answered, perhaps not for the last time."""
        if response.final:
            self._members.discard(member)
            if member.trace is not None:
                member.trace.finish_member(member)
        if self._ended:
            return
        if response.error is not None:
            self.fail(response.error)
            return
        if step.decoupled:
            if response.outputs:
                self._open(scope, step, response)
        elif response.outputs or response.final:
            self._take(scope, step, response)
        if response.final:
            scope.running -= 1
        self._continue(scope)
        self._settle()

    def _take(self, scope: Scope, step: Step, response: InferResponse) -> None:
        """Tensors of a step are known now; those that the member left out are known to be absent."""
        made = {tensor.name: tensor for tensor in response.outputs}
        for output, name in step.outputs.items():
            tensor = made.get(output)
            if tensor is not None or name not in scope.tensors:
                scope.tensors[name] = None if tensor is None else tensor.renamed(name)

    def _open(self, outer: Scope, step: Step, response: InferResponse) -> None:
        """A response of a decoupled member opens a scope."""
        scope = Scope(outer, step, [later for later in self._steps if later.stream is step])
        self._take(scope, step, response)
        self._scopes.append(scope)
        if step is self._innermost:
            self._leaves.append(scope)
        limit = self._scheduler.limit
        if limit and sum(not other.done and other.source is step for other in self._scopes) > limit:
            self._waiting.append(scope)
        else:
            self._advance(scope)

    def _continue(self, scope: Scope) -> None:
        """Tensors of a scope serve the scopes within it too."""
        self._advance(scope)
        for inner in self._scopes:
            if inner.outer is not None and inner.left and not inner.done and inner not in self._waiting:
                self._advance(inner)

    def _settle(self) -> None:
        """Close scopes that are done, send the answers that are complete, end where nothing is left."""
        if self._ended:
            return
        for scope in self._scopes:
            scope.done = not scope.left and not scope.running
        while self._waiting and self._room():
            self._advance(self._waiting.popleft())
            if self._ended:
                return
        while self._leaves and self._leaves[0].done:
            scope = self._leaves.popleft()
            response = InferResponse(self._outputs(scope), final=self._innermost is None, parameters=self._sequence())
            if response.final:
                self._end(response)
                return
            self._scheduler.answers.send(self._request, response)
        self._scopes = [
            scope for scope in self._scopes if not scope.done or scope is self._root or _encloses(scope, self._scopes)
        ]
        if self._innermost is not None and not self._leaves and len(self._scopes) == 1 and self._root.done:
            self._end(InferResponse())

    def _room(self) -> bool:
        source = self._waiting[0].source
        busy = sum(not other.done and other.source is source and other not in self._waiting for other in self._scopes)
        return busy < self._scheduler.limit

    def _outputs(self, scope: Scope) -> list[Tensor]:
        found = (scope.find(name)[1] for name in self._names)
        return [self._as_output(tensor) for tensor in found if tensor is not None]

    def _sequence(self) -> dict[str, Parameter]:
        """What clients of ensembles see in every response."""
        request = self._request
        return {
            "sequence_id": request.sequence_id,
            "sequence_start": request.sequence_start,
            "sequence_end": request.sequence_end,
        }

    def _as_output(self, tensor: Tensor) -> Tensor:
        """With or without a batch dimension as the ensemble has it, where the member has it otherwise."""
        if tensor.name not in self._scheduler.graph.adapted:
            return tensor  # whatever its shape
        return _with_rank(tensor, self._scheduler.batches, len(self._scheduler.graph.outputs[tensor.name].dims))


def _encloses(scope: Scope, scopes: list[Scope]) -> bool:
    return any(other.outer is scope and not other.done for other in scopes)


def _fitted(tensor: Tensor, config: ModelConfig, specs: Any) -> Tensor:
    """A tensor as a member takes it: models differ in whether they have a batch dimension."""
    dims = next(len(spec.dims) for spec in specs if spec.name == tensor.name)
    return _with_rank(tensor, config.max_batch_size > 0, dims)


def _with_rank(tensor: Tensor, batches: bool, dims: int) -> Tensor:
    if batches and len(tensor.shape) == dims:
        return tensor.reshaped((1, *tensor.shape))
    if not batches and len(tensor.shape) == dims + 1 and tensor.shape[0] == 1:
        return tensor.reshaped(tensor.shape[1:])
    return tensor


def _unset(response: InferResponse) -> None:
    raise AssertionError("the request was submitted before it knew whom to answer")
