"""Which tokens are computed next: one token budget, shared by everything.

A sequence knows how many of its tokens are computed; a step assigns it the next ones. Prefill, chunked prefill, decode,
prefix hits and resumption after a preemption are that one rule (after Agrawal et al. 2024, Sarathi-Serve, section 4:
decodes first, then prefill chunks up to the budget). Plain bookkeeping, no tensors.
"""

from __future__ import annotations

import heapq
from bisect import insort
from dataclasses import dataclass, field
from typing import NamedTuple

from trine.llm.cache.blocks import BlockPool
from trine.llm.cache.prefix import extend_identities, root_identity
from trine.llm.outputs import EngineStats, FinishReason
from trine.llm.request import Sequence, SequenceOutput, SequenceRequest, Status, TokenScores

PROMPT_SHARE = 2048
"""Prompt tokens that a step takes beside decodes while prompts don't pile up: with more, each is no cheaper."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """max_num_seqs sequences run at once, max_num_batched_tokens are computed in a step, block_size fill a block."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    max_model_len: int
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                "max_num_batched_tokens must be at least max_num_seqs: every sequence may decode one token"
            )


class Assignment(NamedTuple):
    """Tokens of a sequence, from position `start` on, to compute in the step that is being planned."""

    sequence: Sequence
    start: int
    num_tokens: int


class NewRow(NamedTuple):
    """A sequence that enters a device-side row."""

    row: int
    request: SequenceRequest
    output_token_ids: list[int]


class NewBlocks(NamedTuple):
    """Blocks appended to a row's block table from entry `start` on."""

    row: int
    start: int
    block_ids: list[int]


@dataclass(slots=True)
class Step:
    """One forward pass, as a snapshot: nothing in it changes while the worker reads it.

    Entry i computes `counts[i]` tokens from position `starts[i]` of the sequence in row `rows[i]`. `tokens[i]` are
    their ids, or None for the single token that this row sampled last, which only the device needs to know. Entries
    with one token come first (`num_decodes` of them). `sampled` are the entries after which a token is sampled,
    `guided` the positions in `sampled` whose next token a grammar restricts. `spoiled_blocks` are to be zeroed first:
    a sequence whose numbers were not finite left them, and attention may multiply what lies past a sequence's end by 0.
    """

    sequences: list[Sequence] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    tokens: list[list[int] | None] = field(default_factory=list)
    num_decodes: int = 0
    sampled: list[int] = field(default_factory=list)
    output_index: list[int] = field(default_factory=list)
    guided: list[int] = field(default_factory=list)
    prompt_targets: dict[int, list[int]] = field(default_factory=dict)
    cleared_rows: list[int] = field(default_factory=list)
    spoiled_blocks: list[int] = field(default_factory=list)
    new_rows: list[NewRow] = field(default_factory=list)
    new_blocks: list[NewBlocks] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)


class Scheduler:
    """Queues, rows, blocks. `schedule` hands out a step, `update` takes its tokens back; steps may overlap by one."""

    def __init__(self, limits: SchedulerLimits, pool: BlockPool, eos_token_ids: tuple[int, ...]) -> None:
        self.limits = limits
        self.pool = pool
        self.eos_token_ids = eos_token_ids
        self.running: list[Sequence] = []
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
        self._sequences: dict[int, Sequence] = {}
        self._free_rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self._cleared_rows: list[int] = []
        self._spoiled_blocks: list[int] = []
        self._arrivals = 0
        self._ended: list[SequenceOutput] = []
        self._num_deadlines = 0
        self.stats = EngineStats(blocks_total=pool.num_blocks - 1)

    # --- requests in and out ---------------------------------------------------------------------------------------

    def add(self, request: SequenceRequest, now: float) -> Sequence:
        sequence = Sequence(request, now, self._arrivals, self.eos_token_ids)
        self._arrivals += 1
        self._num_deadlines += sequence.deadline is not None
        self._sequences[sequence.id] = sequence
        heapq.heappush(self._waiting, (sequence.order, sequence))
        return sequence

    def abort(self, sequence_id: int, reason: FinishReason = "abort", error: str | None = None) -> None:
        """End a sequence now; its blocks are free at once. Unknown or finished ids are ignored: they just finished."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            self._finish(sequence, reason)
            self._ended.append(self._output(sequence, [], None, error=error))

    def get(self, sequence_id: int) -> Sequence | None:
        return self._sequences.get(sequence_id)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._ended)

    @property
    def num_waiting(self) -> int:
        return len(self._sequences) - len(self.running)

    def observe(self) -> EngineStats:
        """The statistics as of now."""
        self.stats.running = len(self.running)
        self.stats.waiting = self.num_waiting
        self.stats.blocks_used = self.pool.num_used
        return self.stats

    def drain_ended(self) -> list[SequenceOutput]:
        """Outputs of sequences that ended outside a step: aborted, past their deadline."""
        ended, self._ended = self._ended, []
        return ended

    # --- one step --------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> Step | None:
        """The next step, or None when nothing can be computed now."""
        if self._num_deadlines:
            self._expire(now)
        step = Step()
        plan: list[Assignment] = []
        budget, prefilling = self._continue_decoding(plan, step, self.limits.max_num_batched_tokens)
        if plan:
            budget = min(budget, self._prompt_share(prefilling))
        for sequence in prefilling:
            remaining = sequence.num_tokens - sequence.num_computed
            budget -= self._continue(sequence, min(remaining, budget), plan, step)
        self._admit_waiting(plan, step, budget, now)
        if not plan:
            return None
        step.cleared_rows, self._cleared_rows = self._cleared_rows, []
        step.spoiled_blocks, self._spoiled_blocks = self._spoiled_blocks, []
        self._fill(step, plan)
        self.stats.steps += 1
        return step

    def update(
        self,
        step: Step,
        tokens: list[int],
        scores: list[TokenScores] | None,
        prompt_scores: dict[int, list[TokenScores]],
    ) -> list[SequenceOutput]:
        """Take back what a step sampled: `tokens` and `scores` in the order of `step.sampled`."""
        for entry, entry_scores in prompt_scores.items():
            held = step.sequences[entry].prompt_scores
            if held is not None:
                held.extend(entry_scores)
        outputs = []
        num_tokens = 0
        for position, entry in enumerate(step.sampled):
            sequence = step.sequences[entry]
            if sequence.status is Status.FINISHED:
                continue  # it ended while this step, launched ahead, was computed
            sequence.num_in_flight -= 1
            token = tokens[position]
            if token < 0:
                self._spoiled_blocks += self.pool.discard(sequence.block_ids)
                sequence.block_ids = []
                self._finish(sequence, "error")
                why = "no token can be sampled: the logits hold NaN or infinity"
                if sequence.grammar is not None:
                    why += ", or the grammar allows none here"
                outputs.append(self._output(sequence, [], None, error=why))
                continue
            sequence.tokens.append(token)
            num_tokens += 1
            self._name_full_blocks(sequence)
            stop_id = self._end_if_done(sequence, token)
            k = sequence.params.logprobs
            kept = None if scores is None or k is None else scores[position].cut(k)
            outputs.append(self._output(sequence, [token], kept, stop_id))
        self.stats.generated_tokens += num_tokens
        return outputs

    def _continue_decoding(self, plan: list[Assignment], step: Step, budget: int) -> tuple[int, list[Sequence]]:
        """Decodes first, so that a long prompt never stalls them. Returns what is left of the budget, and the running
        sequences that have more than a token to compute.

        Every running sequence comes by in every step, so that properties are spelled out here and below.
        """
        prefilling = []
        for sequence in list(self.running):
            remaining = len(sequence.tokens) + sequence.num_in_flight - sequence.num_computed
            if remaining == 1:
                budget -= self._continue(sequence, min(1, budget), plan, step)
            elif remaining > 1:
                prefilling.append(sequence)
        return budget, prefilling

    def _prompt_share(self, prefilling: list[Sequence]) -> int:
        """Prompt tokens that a step takes beside decodes, which wait for them: few as long as prompts are served about
        as fast as they come, all that fit when they pile up.
        """
        most = self.limits.max_num_batched_tokens
        backlog = sum(sequence.num_tokens - sequence.num_computed for sequence in prefilling)
        for _, sequence in self._waiting:
            if backlog > 2 * most:
                break
            backlog += sequence.num_tokens
        return most if backlog > 2 * most else PROMPT_SHARE

    def _continue(self, sequence: Sequence, count: int, plan: list[Assignment], step: Step) -> int:
        """Assign a running sequence its next `count` tokens; returns how many it got."""
        if count == 0 or sequence.status is not Status.RUNNING:
            return 0
        if len(sequence.tokens) + sequence.num_in_flight - sequence.num_prompt >= sequence.max_tokens:
            return 0  # its last token is in flight
        fits = sequence.num_computed + count <= len(sequence.block_ids) * self.limits.block_size
        if not fits and not self._make_room(sequence, count, plan, step):
            return 0
        self._assign(plan, sequence, count)
        return count

    def _admit_waiting(self, plan: list[Assignment], step: Step, budget: int, now: float) -> None:
        while budget and self._waiting and self._free_rows:
            sequence = self._waiting[0][1]
            if sequence.status is Status.FINISHED:
                heapq.heappop(self._waiting)
                continue
            if sequence.num_in_flight:
                break  # preempted a moment ago: its last token is not back yet
            hits = self._cached_blocks(sequence)
            needed = -(-sequence.num_tokens // self.limits.block_size) - len(hits)
            # One block to spare for each running sequence, so that a newcomer does not preempt them at once.
            if needed > self.pool.num_free - self.pool.num_free_among(hits) - len(self.running):
                break
            heapq.heappop(self._waiting)
            self._start(sequence, hits, step, now)
            count = min(sequence.num_tokens - sequence.num_computed, budget)
            self._append_blocks(sequence, count, step)
            self._assign(plan, sequence, count)
            budget -= count

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        """Blocks that already hold the beginning of the sequence; at least one token is left to compute."""
        if not self.limits.enable_prefix_caching or sequence.wants_prompt_scores:
            return []
        usable = len(sequence.tokens) - 1
        self._identify_blocks(sequence, usable)
        return self.pool.lookup(sequence.identities[: usable // self.limits.block_size])

    def _start(self, sequence: Sequence, hits: list[int], step: Step, now: float) -> None:
        self.pool.share(hits)
        sequence.status = Status.RUNNING
        sequence.row = self._free_rows.pop()
        sequence.block_ids = hits
        sequence.num_computed = len(hits) * self.limits.block_size
        if sequence.num_cached < 0:
            sequence.num_cached = sequence.num_computed
            sequence.first_scheduled = now
            self.stats.prompt_tokens += sequence.num_prompt
            self.stats.prefix_query_tokens += sequence.num_prompt
            self.stats.prefix_hit_tokens += sequence.num_computed
        insort(self.running, sequence, key=lambda running: running.order)
        step.new_rows.append(NewRow(sequence.row, sequence.request, sequence.tokens[sequence.num_prompt :]))
        if hits:
            step.new_blocks.append(NewBlocks(sequence.row, 0, list(hits)))

    def _make_room(self, sequence: Sequence, count: int, plan: list[Assignment], step: Step) -> bool:
        """Blocks for `count` more tokens, preempting the least urgent if need be; False if that is `sequence`."""
        while not self._append_blocks(sequence, count, step):
            assigned = {assignment.sequence.id for assignment in plan}
            victim = next(running for running in reversed(self.running) if running.id not in assigned)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _append_blocks(self, sequence: Sequence, count: int, step: Step) -> bool:
        have = len(sequence.block_ids)
        missing = -(-(sequence.num_computed + count) // self.limits.block_size) - have
        if missing > self.pool.num_free:
            return False
        if missing > 0:
            blocks = self.pool.allocate(missing)
            sequence.block_ids.extend(blocks)
            step.new_blocks.append(NewBlocks(sequence.row, have, blocks))
        return True

    def _assign(self, plan: list[Assignment], sequence: Sequence, count: int) -> None:
        """Advance the sequence. Blocks that this fills can be shared from now on, even within this very step: every
        layer writes all keys and values of a step before any of its tokens attends to them.
        """
        plan.append(Assignment(sequence, sequence.num_computed, count))
        sequence.num_computed += count
        self._name_full_blocks(sequence)

    def _fill(self, step: Step, plan: list[Assignment]) -> None:
        """Write the plan as a snapshot, decodes first, and count the tokens that will be in flight."""
        decodes = [assignment for assignment in plan if assignment.num_tokens == 1]
        if len(decodes) < len(plan):
            plan = decodes + [assignment for assignment in plan if assignment.num_tokens > 1]
        step.num_decodes = len(decodes)
        step.sequences = [sequence for sequence, _, _ in plan]
        step.rows = [sequence.row for sequence in step.sequences]
        step.starts = [start for _, start, _ in plan]
        step.counts = [count for _, _, count in plan]
        tokens, sampled, output_index = step.tokens, step.sampled, step.output_index
        for entry, (sequence, start, count) in enumerate(plan):
            end = start + count
            in_flight = sequence.num_in_flight
            known = sequence.tokens
            tokens.append(None if in_flight else known[start:end])
            if sequence.prompt_scores is not None and start < sequence.num_prompt - 1:
                step.prompt_targets[entry] = known[start + 1 : min(end + 1, sequence.num_prompt)]
            if end == len(known) + in_flight:
                if sequence.grammar is not None:
                    step.guided.append(len(sampled))
                sampled.append(entry)
                output_index.append(end - sequence.num_prompt)
                sequence.num_in_flight = in_flight + 1

    # --- changes of state ------------------------------------------------------------------------------------------

    def _identify_blocks(self, sequence: Sequence, num_tokens: int) -> None:
        root = root_identity(sequence.request.salt)
        extend_identities(sequence.identities, sequence.tokens, self.limits.block_size, root, num_tokens)

    def _name_full_blocks(self, sequence: Sequence) -> None:
        """Make the blocks that are full, with tokens that are known, available to others."""
        if not self.limits.enable_prefix_caching:
            return
        known = min(sequence.num_computed, len(sequence.tokens))
        if known // self.limits.block_size > sequence.num_named:
            self._identify_blocks(sequence, known)
            for index in range(sequence.num_named, known // self.limits.block_size):
                self.pool.name(sequence.block_ids[index], sequence.identities[index])
            sequence.num_named = known // self.limits.block_size

    def _release(self, sequence: Sequence) -> None:
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self.pool.release(sequence.block_ids)
            self._free_rows.append(sequence.row)
            self._cleared_rows.append(sequence.row)
            sequence.block_ids = []
            sequence.row = -1

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue, blocks given up. Its tokens stay: resuming is a prefill, mostly of cached blocks."""
        self._release(sequence)
        sequence.status = Status.WAITING
        sequence.num_computed = 0
        sequence.num_named = 0
        if sequence.wants_prompt_scores:
            sequence.prompt_scores = []
        self.stats.preemptions += 1
        heapq.heappush(self._waiting, (sequence.order, sequence))

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._release(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        self._num_deadlines -= sequence.deadline is not None
        del self._sequences[sequence.id]

    def _end_if_done(self, sequence: Sequence, token: int) -> int | None:
        """Finish the sequence if `token` was its last; the stop token id if one of the request's own ended it."""
        grammar = sequence.grammar
        if grammar is not None and (token in self.eos_token_ids or not grammar.accept(token) or grammar.is_finished()):
            self._finish(sequence, "stop")  # nothing but the end can follow
        elif token in sequence.stop_ids and sequence.num_output >= sequence.params.min_tokens:
            self._finish(sequence, "stop")
            return token if token in sequence.params.stop_token_ids else None
        elif len(sequence.tokens) - sequence.num_prompt >= sequence.max_tokens:
            self._finish(sequence, "length")
        return None

    def _expire(self, now: float) -> None:
        late = [s.id for s in self._sequences.values() if s.deadline is not None and s.deadline <= now]
        for sequence_id in late:
            self.abort(sequence_id, "deadline")

    def _output(
        self,
        sequence: Sequence,
        token_ids: list[int],
        scores: TokenScores | None,
        stop_token_id: int | None = None,
        error: str | None = None,
    ) -> SequenceOutput:
        is_first = len(sequence.tokens) - sequence.num_prompt <= 1
        return SequenceOutput(
            sequence.id,
            token_ids,
            None if scores is None else [scores],
            sequence.finish_reason,
            stop_token_id,
            max(sequence.num_cached, 0),
            sequence.prompt_scores if is_first else None,
            sequence.first_scheduled,
            error,
        )

    def check(self) -> None:
        """Raise AssertionError if blocks or rows are lost or counted twice. Cheap enough to run whenever idle."""
        self.pool.check(sequence.block_ids for sequence in self.running)
        rows = [sequence.row for sequence in self.running] + self._free_rows
        assert sorted(rows) == list(range(self.limits.max_num_seqs)), "a row is lost or used twice"
        assert all(sequence.status is Status.RUNNING for sequence in self.running), "a sequence runs that should not"
