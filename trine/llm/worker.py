"""One device's share of the engine: the model, its cache tensors and the rows of running sequences. No policy."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trine.llm.batch import Batch, CacheSpec
from trine.llm.models.base import CausalLM
from trine.llm.request import TokenScores
from trine.llm.sampling.logprobs import SampledLogprobs, prompt_logprobs
from trine.llm.sampling.sampler import Sampler
from trine.llm.scheduler import SchedulerLimits, Step
from trine.llm.warmup import rehearse_sampling, rehearsed_batches

if TYPE_CHECKING:
    from trine.kernels.triton.compile_ahead import Compilation
    from trine.llm.small_steps import SmallSteps


@dataclass(slots=True)
class StepResult:
    """Host-side values, in the order of `step.sampled`; `prompt_scores` by entry."""

    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScores] | None = None
    prompt_scores: dict[int, list[TokenScores]] = field(default_factory=dict)


class Worker:
    """Executes steps. A sequence keeps its row while it runs; only what changed comes in with a step.

    `forward` and `sample` only launch work on a GPU; `StepResult`s are read by the callable that `sample` returns.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        vocab_size: int,
        device: torch.device,
        limits: SchedulerLimits,
        num_blocks: int,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self.model = model
        self.device = device
        self.limits = limits
        self.eos_token_ids = eos_token_ids
        self.compilation: Compilation | None = None  # of kernels that later steps may need
        self.sampler = Sampler(limits.max_num_seqs, vocab_size, device)
        # The last entry is for rows that only pad a batch.
        self.last_token = torch.zeros(limits.max_num_seqs + 1, dtype=torch.int64, device=device)
        max_blocks = -(-limits.max_model_len // limits.block_size)
        self._block_table = np.zeros((limits.max_num_seqs, max_blocks), dtype=np.int32)
        self._hidden: torch.Tensor | None = None
        self._chosen: torch.Tensor | None = None
        self._ends: np.ndarray[Any, np.dtype[np.int32]] = np.zeros(0, dtype=np.int32)
        self._small_steps = self._graphs()
        self._cache = allocate_cache(model.cache_specs(), num_blocks, limits.block_size, device)
        model.bind_cache(self._cache)

    def _graphs(self) -> SmallSteps | None:
        if self.device.type != "cuda":
            return None
        from trine.llm.small_steps import SmallSteps

        return SmallSteps(self.model, self.last_token, self._block_table, self.limits.block_size)

    @torch.inference_mode()
    def rehearse(self, first: bool) -> None:
        """Go through the steps of a `first` short prompt, or those of every other kind, for
        `trine.kernels.triton.launch.recording`: no sequence runs yet.
        """
        assert self._small_steps is not None
        self._small_steps.rehearse(first)
        for token_ids, batch in () if first else rehearsed_batches(self.limits, self.device):
            hidden = batch.outputs(self.model(token_ids, batch))
            rehearse_sampling(self.sampler, self.model.compute_logits(hidden))

    @torch.inference_mode()
    def forward(self, step: Step) -> None:
        """Bring the rows up to date and run the model over the step's tokens."""
        self._update_rows(step)
        self._hidden = self._chosen = None
        greedy = self.sampler.is_plain(step.rows)
        result = None if self._small_steps is None else self._small_steps.run(step, greedy)
        if result is None:
            token_ids, batch = self._gather(step)
            self._hidden = self.model(token_ids, batch)
        elif greedy:
            self._chosen = result
        else:
            self._hidden = result

    @torch.inference_mode()
    def sample(self, step: Step, bitmask: torch.Tensor | None = None) -> Callable[[], StepResult]:
        """Sample after `step.sampled`; `bitmask` [len(sampled), ceil(vocab / 32)] int32 has the allowed tokens' bits
        set.
        """
        if self._chosen is not None:
            return self._reader(self._chosen, None, {})
        hidden = self._hidden
        assert hidden is not None, "sample() needs a forward()"
        prompt_scores = self._score_prompts(step, hidden)
        if not step.sampled:
            return lambda: StepResult(prompt_scores=prompt_scores)
        rows = [step.rows[entry] for entry in step.sampled]
        if len(step.sampled) != hidden.shape[0]:
            hidden = hidden[self._to_device(self._ends[step.sampled].astype(np.int64))]
        logits = self.model.compute_logits(hidden)
        if bitmask is not None:
            bitmask = bitmask.to(self.device, non_blocking=True)
        sampled = self.sampler.sample(logits, rows, step.output_index, bitmask)
        self.last_token[self._to_device(np.array(rows, dtype=np.int64))] = sampled.next_input
        return self._reader(sampled.tokens, sampled.logprobs, prompt_scores)

    def _reader(
        self, tokens: torch.Tensor, logprobs: SampledLogprobs | None, prompt_scores: dict[int, list[TokenScores]]
    ) -> Callable[[], StepResult]:
        if self.device.type != "cuda":
            result = StepResult(tokens.tolist(), _token_scores(logprobs), prompt_scores)
            return lambda: result
        on_host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        on_host.copy_(tokens, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()

        def read() -> StepResult:
            done.synchronize()
            return StepResult(on_host.tolist(), _token_scores(logprobs), prompt_scores)

        return read

    def _update_rows(self, step: Step) -> None:
        for row in step.cleared_rows:
            self.sampler.clear_row(row)
        if step.spoiled_blocks:
            blocks = self._to_device(np.array(step.spoiled_blocks, dtype=np.int64))
            for pair in self._cache:
                for cache in pair:
                    cache.view(torch.uint8).index_fill_(0, blocks, 0)  # float8 has no fill of its own
        for new in step.new_rows:
            self.sampler.set_row(
                new.row,
                new.request.params,
                prompt_token_ids=new.request.prompt_token_ids,
                output_token_ids=new.output_token_ids,
                eos_token_ids=self.eos_token_ids,
                bad_words_token_ids=new.request.bad_words_token_ids,
                seed=new.request.seed,
            )
        for row, start, block_ids in step.new_blocks:
            self._block_table[row, start : start + len(block_ids)] = block_ids

    def _gather(self, step: Step) -> tuple[torch.Tensor, Batch]:
        """The step's token ids [T] and its batch. Ids that only the device knows are taken from `last_token` there."""
        block_size = self.limits.block_size
        rows = np.array(step.rows, dtype=np.int64)
        starts = np.array(step.starts, dtype=np.int64)
        counts = np.array(step.counts, dtype=np.int64)
        ends = np.cumsum(counts)
        first = ends - counts
        seq_lens = starts + counts
        max_seq_len = int(seq_lens.max())
        num_tokens = int(ends[-1])
        table = self._block_table[rows, : -(-max_seq_len // block_size)]
        entry_of_token = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(num_tokens) + np.repeat(starts - first, counts)
        slots = table[entry_of_token, positions // block_size] * np.int64(block_size) + positions % block_size
        query_start = np.zeros(len(rows) + 1, dtype=np.int32)
        query_start[1:] = ends
        self._ends = ends.astype(np.int32) - 1
        batch = Batch(
            positions=self._to_device(positions),
            slots=self._to_device(slots),
            query_start=self._to_device(query_start),
            seq_lens=self._to_device(seq_lens.astype(np.int32)),
            block_table=self._to_device(table),
            num_decodes=step.num_decodes,
            max_query_len=int(counts.max()),
            max_seq_len=max_seq_len,
            output_rows=None if step.prompt_targets else self._to_device(self._ends[step.sampled].astype(np.int64)),
        )
        return self._token_ids(step, rows, num_tokens), batch

    def _token_ids(self, step: Step, rows: np.ndarray[Any, np.dtype[np.int64]], num_tokens: int) -> torch.Tensor:
        known: list[int] = []
        on_device = []
        for entry, tokens in enumerate(step.tokens):
            if tokens is None:
                on_device.append((len(known), rows[entry]))
                known.append(0)
            else:
                known.extend(tokens)
        if len(on_device) == num_tokens:
            return self.last_token[self._to_device(rows)]
        token_ids = self._to_device(np.array(known, dtype=np.int64))
        if on_device:
            at, from_rows = (
                self._to_device(np.array(column, dtype=np.int64)) for column in zip(*on_device, strict=True)
            )
            token_ids[at] = self.last_token[from_rows]
        return token_ids

    def _score_prompts(self, step: Step, hidden: torch.Tensor) -> dict[int, list[TokenScores]]:
        """Log-probabilities of prompt tokens, a slice at a time: logits of a whole prompt would be gigabytes."""
        result: dict[int, list[TokenScores]] = {}
        for entry, targets in step.prompt_targets.items():
            first = int(self._ends[entry]) + 1 - step.counts[entry]
            k = step.sequences[entry].params.prompt_logprobs or 0
            scores: list[TokenScores] = []
            for at in range(0, len(targets), 256):
                part = torch.tensor(targets[at : at + 256], dtype=torch.int64, device=self.device)
                logits = self.model.compute_logits(hidden[first + at : first + at + len(part)])
                scores += _token_scores(prompt_logprobs(logits, part, k)) or []
            result[entry] = scores
        return result

    def _to_device(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor


def allocate_cache(
    specs: Sequence[CacheSpec], num_blocks: int, block_size: int, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of every layer: [num_blocks, num_kv_heads, block_size, head_dim]. Zeroed: pages are touched now,
    not under load, and no kernel ever reads a NaN that lay there before.
    """
    return [
        tuple(  # type: ignore[misc]
            torch.zeros(num_blocks, spec.num_kv_heads, block_size, spec.head_dim, dtype=spec.dtype, device=device)
            for _ in ("keys", "values")
        )
        for spec in specs
    ]


def _token_scores(logprobs: SampledLogprobs | None) -> list[TokenScores] | None:
    if logprobs is None:
        return None
    columns = (logprobs.sampled_logprob, logprobs.sampled_rank, logprobs.top_ids, logprobs.top_logprobs)
    return [TokenScores(*fields) for fields in zip(*(column.tolist() for column in columns), strict=True)]


class InlineExecutor:
    """Runs steps in the caller's thread: on a GPU that only launches them, on a CPU it is the synchronous reference."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def forward(self, step: Step) -> None:
        self._worker.forward(step)

    def sample(self, step: Step, bitmask: torch.Tensor | None = None) -> Callable[[], StepResult]:
        return self._worker.sample(step, bitmask)

    def close(self) -> None:
        release(self)


class ThreadExecutor:
    """Runs steps in one thread of its own, in order: what a stream is to a GPU. Kernels release the GIL meanwhile."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trine-worker")
        self._forwarded: Future[None] | None = None

    def forward(self, step: Step) -> None:
        if step.guided:
            self._forwarded = self._thread.submit(self._worker.forward, step)

    def sample(self, step: Step, bitmask: torch.Tensor | None = None) -> Callable[[], StepResult]:
        # Bound now: by the time `run` runs, the next step's forward pass may be queued behind it.
        forwarded = self._forwarded if step.guided else None

        def run() -> StepResult:
            if forwarded is not None:
                forwarded.result()  # raises what the forward pass raised
            else:
                self._worker.forward(step)
            return self._worker.sample(step, bitmask)()

        return self._thread.submit(run).result

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        release(self)


def release(executor: InlineExecutor | ThreadExecutor) -> None:
    """Let go of the worker, and give a GPU's memory back so that another engine can be loaded in this process."""
    if not hasattr(executor, "_worker"):
        return  # closed before
    on_gpu = executor._worker.device.type == "cuda"
    if executor._worker.compilation is not None:
        executor._worker.compilation.close()
    del executor._worker
    if on_gpu:
        gc.unfreeze()  # what was frozen when the engine was built
    gc.collect()  # modules and graphs refer to each other in circles
    if on_gpu:
        torch.cuda.empty_cache()
