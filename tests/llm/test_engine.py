"""The engine through its Python API, on a small random checkpoint: the two loops, sampling, stopping, faults."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoints import save_checkpoint
from trine import LLM, AsyncLLM, GuidedParams, SamplingParams
from trine.core.errors import (
    ConfigurationError,
    DeadlineExceededError,
    EngineDeadError,
    InsufficientMemoryError,
    OverloadedError,
    RequestError,
)
from trine.llm.outputs import RequestOutput

SMALL: dict[str, Any] = {"cache_bytes": 4 << 20, "max_num_seqs": 16, "max_num_batched_tokens": 64, "threads": 1}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(checkpoint, **SMALL) as llm:
        yield llm
        llm.check()


@pytest.fixture(scope="module")
def sync_llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(checkpoint, async_loop=False, **SMALL) as llm:
        yield llm
        llm.check()


def ids(output: RequestOutput) -> list[list[int]]:
    return [sequence.token_ids for sequence in output.outputs]


def test_greedy_is_the_same_alone_and_in_a_batch(llm: LLM) -> None:
    prompts = ["a", "Some prompt of a length", "x" * 100, "The quick brown fox"]
    together = llm.generate(prompts, GREEDY)
    assert [ids(output) for output in together] == [ids(llm.generate(prompt, GREEDY)[0]) for prompt in prompts]


def random_workload(rng: random.Random) -> list[tuple[Any, SamplingParams]]:
    shared = [rng.randrange(256) for _ in range(rng.randrange(40))]
    workload = []
    for _ in range(rng.randrange(1, 7)):
        prompt = (shared if rng.random() < 0.5 else []) + [rng.randrange(256) for _ in range(rng.randrange(1, 60))]
        params = SamplingParams(
            temperature=rng.choice([0, 0.7, 1.5]),
            top_k=rng.choice([0, 0, 5]),
            top_p=rng.choice([1.0, 0.9]),
            min_p=rng.choice([0.0, 0.05]),
            seed=rng.randrange(1000),
            n=rng.choice([1, 1, 2]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            presence_penalty=rng.choice([0.0, 0.5]),
            logit_bias=rng.choice([{}, {5: 4.0}]),
            max_tokens=rng.randrange(1, 30),
            min_tokens=0,
            ignore_eos=rng.random() < 0.5,
            logprobs=rng.choice([None, 2]),
            stop=rng.choice([(), ("e",), ("ab", "q")]),
        )
        workload.append(({"prompt_token_ids": prompt}, params))
    return workload


def compare_loops(llm: LLM, sync_llm: LLM, seeds: range) -> None:
    for seed in seeds:
        prompts, params = zip(*random_workload(random.Random(seed)), strict=True)
        ahead, reference = (engine.generate(list(prompts), list(params)) for engine in (llm, sync_llm))
        for one, other in zip(ahead, reference, strict=True):
            assert ids(one) == ids(other), f"workload {seed}"
            assert [o.text for o in one.outputs] == [o.text for o in other.outputs]
            assert [o.finish_reason for o in one.outputs] == [o.finish_reason for o in other.outputs]


def test_async_loop_equals_sync_loop(llm: LLM, sync_llm: LLM) -> None:
    compare_loops(llm, sync_llm, range(120))


@pytest.mark.slow
def test_async_loop_equals_sync_loop_500(llm: LLM, sync_llm: LLM) -> None:
    compare_loops(llm, sync_llm, range(120, 620))


def test_numbers_that_are_not_finite_leave_nothing_behind(tmp_path: Path) -> None:
    """A token whose embedding is NaN: its request fails, and the blocks that it filled are zero for the next one."""
    save_checkpoint(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding.clone()
    embedding[35] = math.nan
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with LLM(tmp_path, **SMALL) as llm:
        expected = ids(llm.generate("a healthy prompt", GREEDY)[0])
        with pytest.raises(RequestError, match="NaN"):
            llm.generate({"prompt_token_ids": [35] * 40}, GREEDY)
        assert ids(llm.generate("a healthy prompt", GREEDY)[0]) == expected
        cache = llm._core._executor._worker._cache  # type: ignore[attr-defined]
        assert all(bool(tensor.isfinite().all()) for pair in cache for tensor in pair)
        llm.check()


def test_preemption_does_not_change_tokens(checkpoint: Path, llm: LLM) -> None:
    prompts = [f"prompt number {i} " * 3 for i in range(8)]
    params = GREEDY.replace(max_tokens=150)
    with LLM(checkpoint, **(SMALL | {"cache_bytes": 40 * 16 * 512, "max_model_len": 256})) as tight:
        outputs = tight.generate(prompts, params)
        assert tight.stats.preemptions > 0
        tight.check()
    assert [ids(o) for o in outputs] == [ids(o) for o in llm.generate(prompts, params)]


def test_prefix_is_reused_and_changes_nothing(checkpoint: Path) -> None:
    prompt = "a long shared beginning " * 8
    with LLM(checkpoint, **SMALL) as cached, LLM(checkpoint, enable_prefix_caching=False, **SMALL) as plain:
        first, second = (cached.generate(prompt, GREEDY)[0] for _ in range(2))
        assert first.num_cached_tokens == 0
        assert second.num_cached_tokens >= len(prompt) - 32
        assert ids(first) == ids(second) == ids(plain.generate(prompt, GREEDY)[0])


def test_same_seed_same_tokens_whatever_the_batch(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=20, ignore_eos=True)
    alone = ids(llm.generate("seeded", params)[0])
    others = [params.replace(seed=i, temperature=0.5) for i in range(5)]
    together = llm.generate(["other"] * 5 + ["seeded"], [*others, params])
    assert ids(together[-1]) == alone
    assert ids(llm.generate("seeded", params.replace(seed=8))[0]) != alone


def test_n_sequences_differ_and_best_of_keeps_the_most_probable(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=1, n=4, max_tokens=12, ignore_eos=True, logprobs=0)
    (output,) = llm.generate("several", params)
    assert [o.index for o in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(tokens) for tokens in ids(output)}) == 4
    (best,) = llm.generate("several", params.replace(n=1, best_of=4))
    ranked = sorted(output.outputs, key=lambda o: -(o.cumulative_logprob or 0.0))
    assert ids(best) == [ranked[0].token_ids]


def test_stop_string_is_cut_exactly_and_over_token_boundaries(llm: LLM) -> None:
    (free,) = llm.generate("stop test", GREEDY)
    text = free.outputs[0].text
    assert len(text) > 12
    stop = text[5:8]
    at = text.index(stop)
    (stopped,) = llm.generate("stop test", GREEDY.replace(stop=(stop, "never")))
    assert stopped.outputs[0].text == text[:at]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", stop)
    (included,) = llm.generate("stop test", GREEDY.replace(stop=(stop,), include_stop_str_in_output=True))
    assert included.outputs[0].text == text[: at + len(stop)]


def test_stop_token_and_min_tokens(llm: LLM) -> None:
    (free,) = llm.generate("tokens", GREEDY)
    tokens = free.outputs[0].token_ids
    stop = tokens[4]
    first = tokens.index(stop)
    (stopped,) = llm.generate("tokens", GREEDY.replace(stop_token_ids=(stop,)))
    assert stopped.outputs[0].token_ids == tokens[: first + 1]
    assert stopped.outputs[0].stop_reason == stop
    (longer,) = llm.generate("tokens", GREEDY.replace(stop_token_ids=(stop,), min_tokens=first + 3))
    assert len(longer.outputs[0].token_ids) >= first + 3


def test_logprobs_are_cut_to_what_each_request_asked_for(llm: LLM) -> None:
    outputs = llm.generate(["a", "b", "c"], [GREEDY.replace(logprobs=k) for k in (None, 0, 5)])
    assert outputs[0].outputs[0].logprobs is None
    for output, k in zip(outputs[1:], (0, 5), strict=True):
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None
        assert len(logprobs) == 24
        for entry, token in zip(logprobs, output.outputs[0].token_ids, strict=True):
            assert entry[token].rank == 1  # greedy takes the most probable
            assert len(entry) == max(1, k)


def test_prompt_logprobs_cover_the_prompt_even_when_cached(llm: LLM) -> None:
    prompt = "score this prompt, which is longer than one step of the engine allows, please " * 2
    plain = llm.generate(prompt, GREEDY)[0]
    scored = llm.generate(prompt, GREEDY.replace(prompt_logprobs=2))[0]
    assert ids(scored) == ids(plain)
    assert scored.prompt_logprobs is not None
    assert scored.prompt_logprobs[0] is None
    assert len(scored.prompt_logprobs) == len(scored.prompt_token_ids)
    for entry, token in zip(scored.prompt_logprobs[1:], scored.prompt_token_ids[1:], strict=True):
        assert entry is not None
        assert token in entry


def test_guided_choice_in_a_mixed_batch(llm: LLM, sync_llm: LLM) -> None:
    guided = SamplingParams(temperature=1.0, seed=3, max_tokens=20, guided=GuidedParams(choice=("yes", "no, never")))
    for engine in (llm, sync_llm):
        outputs = engine.generate(["q"] * 4, [guided, GREEDY, guided.replace(seed=4), GREEDY.replace(max_tokens=3)])
        for output in (outputs[0], outputs[2]):
            assert output.outputs[0].text in ("yes", "no, never")
            assert output.outputs[0].finish_reason == "stop"
        assert len(outputs[1].outputs[0].token_ids) == 24


def test_bad_grammar_is_the_requests_error(llm: LLM) -> None:
    with pytest.raises(RequestError):
        llm.generate("q", SamplingParams(guided=GuidedParams(regex="(unclosed")))
    llm.check()
    assert llm.generate("still works", GREEDY)[0].finished


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", GREEDY, "empty"),
        ({"prompt_token_ids": [5, 10**6]}, GREEDY, "1000000"),
        ({"prompt_token_ids": [-1]}, GREEDY, "-1"),
        ({"prompt_token_ids": [5, 1 << 40]}, GREEDY, str(1 << 40)),
        ({"prompt_token_ids": [5, 1.5]}, GREEDY, "1.5 is no integer"),
        ({"prompt_token_ids": ["5"]}, GREEDY, "'5' is no integer"),
        ("x" * 600, GREEDY, "512"),
        ("x" * 500, GREEDY.replace(max_tokens=100), "max_tokens"),
        ("x", GREEDY.replace(logit_bias={10**6: 1.0}), "logit_bias"),
        ("x", GREEDY.replace(stop_token_ids=(10**6,)), "stop_token_ids"),
        (3, GREEDY, "int"),
    ],
)
def test_bad_requests_say_what_is_wrong(llm: LLM, prompt: Any, params: SamplingParams, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate([prompt], params)
    assert llm.stats.blocks_used == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "float8"}, ConfigurationError, "float8"),
        ({"device": "cuda"}, ConfigurationError, "cuda"),
        ({"max_model_len": 100000}, ConfigurationError, "100000"),
        ({"cache_bytes": 1 << 50}, InsufficientMemoryError, "cache-memory"),
        ({"cache_bytes": 1 << 12}, InsufficientMemoryError, "cache"),
        ({"block_size": 10}, ConfigurationError, "block_size"),
    ],
)
def test_bad_options_say_what_is_wrong(
    checkpoint: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LLM(checkpoint, **(SMALL | options))


# --- the asynchronous front -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["process", "thread"])
def engine_process(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


async def start(checkpoint: Path, **options: Any) -> AsyncLLM:
    engine = AsyncLLM(checkpoint, **(SMALL | options))
    assert not engine.is_ready
    await engine.start()
    assert engine.is_ready
    return engine


async def test_streams_equal_offline_output(checkpoint: Path, llm: LLM, engine_process: bool) -> None:
    engine = await start(checkpoint, engine_process=engine_process)
    prompts = ["first", "second one", "third prompt here"]
    streams = [engine.stream(prompt, GREEDY.replace(n=2, seed=5)) for prompt in prompts]
    texts = [["", ""] for _ in prompts]
    for stream, text in zip(streams, texts, strict=True):
        async for deltas in stream:
            for delta in deltas:
                text[delta.index] += delta.text
    offline = llm.generate(prompts, GREEDY.replace(n=2, seed=5))
    assert texts == [[o.text for o in output.outputs] for output in offline]
    assert engine.num_requests == 0
    await engine.close()


async def test_cancelling_frees_the_blocks(checkpoint: Path, engine_process: bool) -> None:
    engine = await start(checkpoint, engine_process=engine_process)
    stream = engine.stream("to be cancelled", GREEDY.replace(max_tokens=400))
    async for _ in stream:
        break
    abandoned = engine.stream("nobody reads this", GREEDY.replace(max_tokens=400))
    abandoned.cancel()
    stream.cancel()
    assert engine.num_requests == 0
    await engine.generate("another", GREEDY)
    assert (engine.stats.blocks_used, engine.stats.running) == (0, 0)
    await engine.close()


async def test_overload_is_refused_and_deadlines_hold(checkpoint: Path) -> None:
    engine = await start(checkpoint, engine_process=False, max_num_seqs=2, max_waiting=1)
    streams = [engine.stream("x", GREEDY.replace(max_tokens=100)) for _ in range(3)]
    with pytest.raises(OverloadedError, match="limit is 3"):
        engine.stream("x", GREEDY)
    streams[2].cancel()
    late = engine.stream("x", GREEDY.replace(max_tokens=400), deadline=0.0)
    with pytest.raises(DeadlineExceededError):
        await late.collect()
    assert all(output.finished for output in await asyncio.gather(*(s.collect() for s in streams[:2])))
    await engine.close()


async def test_a_killed_engine_fails_its_requests_and_comes_back(checkpoint: Path) -> None:
    engine = await start(checkpoint)
    stream = engine.stream("will be killed", GREEDY.replace(max_tokens=450))
    os.kill(engine._transport.pid, signal.SIGKILL)  # type: ignore[union-attr]
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        await asyncio.wait_for(stream.collect(), 10)
    assert not engine.is_ready
    with pytest.raises(EngineDeadError):
        engine.stream("not yet", GREEDY)
    async with asyncio.timeout(60):
        while not engine.is_ready:
            await asyncio.sleep(0.05)
    assert (await engine.generate("works again", GREEDY)).finished
    assert engine.restarts == 1
    await engine.close()


async def test_drain_refuses_new_requests_and_finishes_old_ones(checkpoint: Path) -> None:
    engine = await start(checkpoint, engine_process=False)
    running = asyncio.ensure_future(engine.stream("running", GREEDY).collect())
    await asyncio.sleep(0)
    draining = asyncio.ensure_future(engine.drain(20))
    await asyncio.sleep(0)
    with pytest.raises(EngineDeadError, match="shutting down"):
        engine.stream("new", GREEDY)
    assert await draining
    assert (await running).finished
    await engine.close()


async def test_a_model_that_can_not_load_says_why(tmp_path: Path, engine_process: bool) -> None:
    save_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    engine = AsyncLLM(tmp_path, engine_process=engine_process, **SMALL)
    with pytest.raises(Exception, match="safetensors"):
        await engine.start()
    await engine.close()


async def test_beam_search_is_the_same_in_both_fronts(checkpoint: Path, llm: LLM) -> None:
    params = SamplingParams(temperature=0, n=2, best_of=3, use_beam_search=True, max_tokens=8)
    engine = await start(checkpoint, engine_process=False)
    output = await engine.generate("beams", params)
    assert ids(output) == ids(llm.generate("beams", params)[0])
    await engine.close()
