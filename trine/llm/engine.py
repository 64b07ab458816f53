"""The engine's loop: schedule, execute, update.

Two loops with the same tokens. The synchronous one is the reference: it reads a step's tokens before it plans the next.
The asynchronous one plans and launches step N + 1 while step N is still being computed: each running sequence is
assumed to go on, its token stays on the device, and what turns out to have ended is dropped when it comes back.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import torch

from trine.core.errors import TrineError
from trine.llm.outputs import EngineStats
from trine.llm.request import SequenceOutput, SequenceRequest, Status, StepOutput
from trine.llm.scheduler import Scheduler, Step
from trine.llm.worker import StepResult

if TYPE_CHECKING:
    from trine.llm.sampling.grammar import Grammar, GrammarCompiler


class Executor(Protocol):
    """Computes steps in the order they are given (trine.llm.worker)."""

    def forward(self, step: Step) -> None: ...
    def sample(self, step: Step, bitmask: torch.Tensor | None = None) -> Callable[[], StepResult]: ...
    def close(self) -> None: ...


class EngineCore:
    """Schedules and executes; knows neither text nor protocols. `grammars` makes the compiler on first use."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        vocab_size: int,
        async_loop: bool,
        grammars: Callable[[], GrammarCompiler],
    ) -> None:
        self.scheduler = scheduler
        self._executor = executor
        self._async = async_loop
        self._mask_words = -(-vocab_size // 32)
        self._make_compiler = grammars
        self._compiler: GrammarCompiler | None = None
        self._compiling: dict[int, tuple[SequenceRequest, Future[Grammar]]] = {}
        self._compiler_thread: ThreadPoolExecutor | None = None
        self._pending: tuple[Step, Callable[[], StepResult]] | None = None

    # --- requests --------------------------------------------------------------------------------------------------

    def add(self, request: SequenceRequest) -> None:
        """Queue a sequence. A guided one waits, without holding up others, until its grammar is compiled."""
        if request.params.guided is None:
            self.scheduler.add(request, time.monotonic())
            return
        if self._compiler_thread is None:
            self._compiler_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trine-grammar")
        self._compiling[request.id] = (request, self._compiler_thread.submit(self._compile, request))

    def abort(self, sequence_id: int) -> None:
        self._compiling.pop(sequence_id, None)
        self.scheduler.abort(sequence_id)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._pending is not None or bool(self._compiling)

    @property
    def stats(self) -> EngineStats:
        return self.scheduler.observe()

    # --- the loop --------------------------------------------------------------------------------------------------

    def step(self) -> StepOutput:
        """Advance by one step and return what became known. Call while `has_work`."""
        outputs = self._admit_compiled()
        step = self.scheduler.schedule(time.monotonic())
        outputs += self.scheduler.drain_ended()
        if step is None and self._pending is None and self._compiling:
            time.sleep(0.0005)  # nothing to compute until a grammar is there
        if not self._async:
            if step is not None:
                self._executor.forward(step)
                outputs += self._update(step, self._executor.sample(step, self._bitmask(step)))
            return StepOutput(outputs, self.stats)
        launched = None
        if step is not None:
            self._executor.forward(step)
            launched = None if step.guided else self._executor.sample(step)
        if self._pending is not None:
            outputs += self._update(*self._pending)
        if step is not None and launched is None:
            # The masks need the tokens just read; they are computed while the forward pass runs.
            launched = self._executor.sample(step, self._bitmask(step))
        self._pending = None if step is None or launched is None else (step, launched)
        return StepOutput(outputs, self.stats)

    def check(self) -> None:
        """Raise AssertionError if anything leaked; meant for idle moments."""
        self.scheduler.check()
        if not self.has_work:
            used = self.scheduler.pool.num_used
            assert used == 0, f"{used} cache blocks are in use though nothing runs"

    def close(self) -> None:
        gc.unfreeze()  # build_engine may have frozen what loading made: collections may free it again
        self._executor.close()
        if self._compiler_thread is not None:
            self._compiler_thread.shutdown(wait=False, cancel_futures=True)

    def _update(self, step: Step, read: Callable[[], StepResult]) -> list[SequenceOutput]:
        result = read()
        return self.scheduler.update(step, result.tokens, result.scores, result.prompt_scores)

    # --- grammars --------------------------------------------------------------------------------------------------

    def _compile(self, request: SequenceRequest) -> Grammar:
        if self._compiler is None:
            self._compiler = self._make_compiler()
        assert request.params.guided is not None
        return self._compiler.compile(request.params.guided)

    def _admit_compiled(self) -> list[SequenceOutput]:
        failed = []
        for sequence_id, (request, future) in list(self._compiling.items()):
            if not future.done():
                continue
            del self._compiling[sequence_id]
            try:
                grammar = future.result()
            except TrineError as error:
                failed.append(SequenceOutput(sequence_id, [], finish_reason="error", error=error.message))
                continue
            assert self._compiler is not None
            sequence = self.scheduler.add(request, time.monotonic())
            sequence.grammar = self._compiler.new_state(grammar)
        return failed

    def _bitmask(self, step: Step) -> torch.Tensor | None:
        """[len(step.sampled), ceil(vocab / 32)] int32, a set bit allows a token; None when no grammar is in the
        step.
        """
        if not step.guided:
            return None
        bitmask = torch.full((len(step.sampled), self._mask_words), -1, dtype=torch.int32)
        for position in step.guided:
            sequence = step.sequences[step.sampled[position]]
            if sequence.status is not Status.FINISHED and sequence.grammar is not None:
                num_sampled = len(sequence.tokens) - sequence.num_prompt
                sequence.grammar.fill_mask(bitmask[position], sequence.max_tokens - num_sampled)
        return bitmask
