"""The response cache and the rate limiter."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakeredis import FakeAsyncRedis

from tests.server.serving import SleepingBackend, identity, infer, row, serving, slow, start
from trine.core.errors import ModelLoadError
from trine.server.request import InferRequest, RequestedOutput
from trine.server.scheduling.response_cache import LocalCache, RedisCache, request_key
from trine.server.tensors import Tensor

CACHED = "response_cache { enable: true }"


async def test_a_repeated_request_is_answered_from_the_cache(tmp_path: Path) -> None:
    slow(tmp_path, "m", CACHED)
    slow(tmp_path, "off", "")
    backend = SleepingBackend()
    async with serving(tmp_path, backend, cache_size=1 << 20) as repository:
        for value in (1.0, 2.0, 1.0, 1.0):
            assert (await infer(repository, "m", {"IN": row(value)}))["OUT"].item() == value
            await infer(repository, "off", {"IN": row(value)})
        assert [name for name, _ in backend.batches].count("m:0") == 2
        assert [name for name, _ in backend.batches].count("off:0") == 4
        statistics = repository.model("m").statistics
        assert (statistics.cache_hit.count, statistics.cache_miss.count) == (2, 2)
        assert (statistics.success.count, statistics.inference_count, statistics.execution_count) == (4, 2, 2)
        assert repository.model("off").statistics.cache_miss.count == 0


async def test_errors_are_not_stored_and_without_a_cache_nothing_is(tmp_path: Path) -> None:
    slow(tmp_path, "m", CACHED + 'parameters { key: "fails" value { string_value: "1" } }')
    identity(tmp_path, extra=CACHED)
    async with serving(tmp_path) as repository:
        for _ in range(2):
            await infer(repository, "identity", {"IN": row(1, 2, 3, 4)})
        assert repository.model("identity").statistics.cache_miss.count == 0
    async with serving(tmp_path, cache_size=1 << 20) as repository:
        for _ in range(2):
            with pytest.raises(Exception, match="told to fail"):
                await infer(repository, "m", {"IN": row(1)})
        assert repository.model("m").statistics.cache_hit.count == 0


def request(value: float, **options: Any) -> InferRequest:
    return InferRequest("m", {"x": Tensor.of("x", row(value))}, lambda response: None, **options)


def test_keys_tell_apart_what_has_another_answer() -> None:
    keys = [
        request_key("m", "1", request(1)),
        request_key("m", "2", request(1)),
        request_key("n", "1", request(1)),
        request_key("m", "1", request(2)),
        request_key("m", "1", request(1, outputs=[RequestedOutput("y")])),
    ]
    assert len(set(keys)) == len(keys)
    assert request_key("m", "1", request(1, id="other")) == keys[0]


def test_the_local_cache_forgets_what_was_used_least_recently() -> None:
    cache = LocalCache(3 * (256 + 400))
    outputs = [Tensor.of("y", np.zeros(100, np.float32))]
    found: list[bool] = []
    for key in (b"a", b"b", b"c"):
        cache.insert(key, outputs)
    cache.look_up(b"a", lambda answer: found.append(answer is not None))
    cache.insert(b"d", outputs)
    cache.insert(b"large", [Tensor.of("y", np.zeros(1000, np.float32))])
    for key in (b"a", b"b", b"c", b"d", b"large"):
        cache.look_up(key, lambda answer: found.append(answer is not None))
    assert found == [True, True, False, True, True, False]


async def test_redis_shares_answers_between_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import redis.asyncio

    store = FakeAsyncRedis()  # speaks to the client library as a server would
    monkeypatch.setattr(redis.asyncio.Redis, "from_url", lambda url, **options: store)
    first, second = RedisCache("redis://somewhere"), RedisCache("redis://somewhere")
    slow(tmp_path, "m", CACHED)
    backend = SleepingBackend()
    for cache in (first, second):
        async with serving(tmp_path, backend, cache_url="redis://somewhere") as repository:
            assert isinstance(repository.cache, RedisCache)
            assert (await infer(repository, "m", {"IN": row(4)}))["OUT"].tolist() == [[4]]
            await asyncio.gather(*repository.cache._tasks)
            statistics = repository.model("m").statistics
            expected = (0, 1) if cache is first else (1, 0)
            assert (statistics.cache_hit.count, statistics.cache_miss.count) == expected
    assert len(backend.batches) == 1


def limited(count: int, *, resource: str = "r", priority: int = 1, instances: int = 1, everywhere: bool = True) -> str:
    return f"""instance_group [{{ kind: KIND_CPU count: {instances} rate_limiter {{ priority: {priority}
      resources [{{ name: "{resource}" count: {count} global: {str(everywhere).lower()} }}] }} }}]
      parameters {{ key: "delay_ms" value {{ string_value: "15" }} }}"""


async def test_instances_share_resources(tmp_path: Path) -> None:
    slow(tmp_path, "a", limited(2, instances=2))
    slow(tmp_path, "b", limited(1, instances=2))
    backend = SleepingBackend()
    async with serving(tmp_path, backend, rate_limit=True, rate_limit_resources={("r", None): 2}) as repository:
        await asyncio.gather(*(start(repository, name, {"IN": row(i)}) for i in range(4) for name in "ab"))
        assert backend.most_concurrent == 2  # two of b; a and anything else never
        assert len(backend.batches) == 8
    backend = SleepingBackend()
    async with serving(tmp_path, backend) as repository:
        await asyncio.gather(*(start(repository, name, {"IN": row(i)}) for i in range(4) for name in "ab"))
        assert backend.most_concurrent == 4  # off: it limits nothing


async def test_priority_two_has_half_the_chances(tmp_path: Path) -> None:
    slow(tmp_path, "often", limited(1))
    slow(tmp_path, "seldom", limited(1, priority=2))
    backend = SleepingBackend()
    async with serving(tmp_path, backend, rate_limit=True) as repository:
        waiting = [start(repository, name, {"IN": row(i)}) for i in range(12) for name in ("often", "seldom")]
        await asyncio.gather(*waiting)
        first = [name.partition(":")[0] for name, _ in backend.batches[:12]]
        assert first.count("often") == 8
        assert backend.most_concurrent == 1


async def test_more_than_there_is_is_refused(tmp_path: Path) -> None:
    slow(tmp_path, "m", limited(5))
    with pytest.raises(ModelLoadError, match="needs 5 of resource 'r', there are 2"):
        async with serving(tmp_path, rate_limit=True, rate_limit_resources={("r", None): 2}):
            pass
