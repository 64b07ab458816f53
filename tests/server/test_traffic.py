"""Traffic splits: weights hold, keys stick, promotion and rollback lose nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.server.serving import infer, row, scaling, serving
from trine.server.errors import ServerError
from trine.server.metrics import MetricsPage
from trine.server.repository import Repository
from trine.server.traffic import TrafficSplit

VERSIONS = {"1": 1.0, "2": 2.0, "3": 3.0}
ALL = "max_batch_size: 8 version_policy { all { } }"


async def version(repository: Repository, **options: Any) -> int:
    return int((await infer(repository, "m", {"x": row(1, 1, 1, 1)}, **options))["y"][0, 0])


async def test_weights_hold(tmp_path: Path) -> None:
    scaling(tmp_path, "m", VERSIONS, ALL)
    async with serving(tmp_path) as repository:
        assert await version(repository) == 3
        repository.set_traffic("m", TrafficSplit({"1": 90, "2": 10}))
        total = 2000
        counts = [0, 0, 0, 0]
        for _ in range(total // 50):
            for chosen in await asyncio.gather(*(version(repository) for _ in range(50))):
                counts[chosen] += 1
        deviation = (total * 0.9 * 0.1) ** 0.5
        assert abs(counts[2] - 0.1 * total) < 3 * deviation
        assert counts[1] + counts[2] == total
        assert await version(repository, model_version="3") == 3  # a version that is named is not split
        assert await version(repository, context={"trine-traffic-version": "3"}) == 3
        split = repository.traffic("m")
        assert split is not None
        assert split.describe()["weights"] == {"1": 90.0, "2": 10.0}
        page = MetricsPage(repository).render().decode()
        assert 'trine_traffic_weight{model="m",version="2"} 10.0' in page
        assert f'trine_traffic_requests{{model="m",version="2"}} {counts[2]}' in page
        assert f'nv_inference_request_success{{model="m",version="2"}} {counts[2]}' in page


async def test_keys_stick_and_few_move(tmp_path: Path) -> None:
    scaling(tmp_path, "m", VERSIONS, ALL)
    async with serving(tmp_path) as repository:

        async def arms() -> list[int]:
            keys = [{"trine-traffic-key": f"user-{number}"} for number in range(200)]
            return list(await asyncio.gather(*(version(repository, context=key) for key in keys)))

        repository.set_traffic("m", TrafficSplit({"1": 80, "2": 20}))
        first = await arms()
        assert await arms() == first
        assert 20 <= first.count(2) <= 60
        repository.set_traffic("m", TrafficSplit({"1": 70, "2": 30}))
        second = await arms()
        assert all(later == 2 for before, later in zip(first, second, strict=True) if before == 2)
        moved = sum(before != later for before, later in zip(first, second, strict=True))
        assert 5 <= moved <= 40


async def test_promotion_and_rollback_under_load(tmp_path: Path) -> None:
    scaling(tmp_path, "m", VERSIONS, ALL)
    async with serving(tmp_path) as repository:
        stop = False
        seen: list[int] = []

        async def client() -> None:
            while not stop:
                seen.append(await version(repository))

        clients = [asyncio.create_task(client()) for _ in range(4)]
        for _ in range(5):
            for weights in ({"1": 50, "2": 50}, {"2": 100}):
                repository.set_traffic("m", TrafficSplit(weights))
                await asyncio.sleep(0.005)
            repository.roll_back_traffic("m")
            await asyncio.sleep(0.005)
        split = repository.traffic("m")
        assert split is not None
        assert split.weights == {"1": 50.0, "2": 50.0}
        repository.set_traffic("m", None)
        assert await version(repository) == 3
        stop = True
        await asyncio.gather(*clients)
        assert {1, 2} <= set(seen)


async def test_what_can_not_be_split_is_refused(tmp_path: Path) -> None:
    scaling(tmp_path, "m", VERSIONS)
    async with serving(tmp_path) as repository:
        with pytest.raises(ServerError, match="can't go to version 1: ready are 3; set version_policy"):
            repository.set_traffic("m", TrafficSplit({"1": 1, "3": 1}))
        with pytest.raises(ServerError, match="'none' is not found"):
            repository.set_traffic("none", None)
    for arms in (["1"], ["1=x"], ["1=1", "1=2"], ["a=3"]):
        with pytest.raises(ServerError, match="is not VERSION=WEIGHT"):
            TrafficSplit.parse(arms)
    assert TrafficSplit.parse(["2=10", "1 = 90%"]).weights == {"1": 90.0, "2": 10.0}
    for weights in ({}, {"1": 0.0}, {"1": -1.0}, {"1": float("nan")}):
        with pytest.raises(ServerError, match="can't be used"):
            TrafficSplit(weights)


async def test_a_version_that_goes_away_leaves_its_share_to_the_newest(tmp_path: Path) -> None:
    scaling(tmp_path, "m", VERSIONS, ALL)
    async with serving(tmp_path, control_mode="explicit", load_models=("m",)) as repository:
        repository.set_traffic("m", TrafficSplit({"1": 100}))
        assert await version(repository) == 1
        scaling(tmp_path, "m", VERSIONS, "max_batch_size: 8")
        await repository.load("m")
        assert await version(repository) == 3
