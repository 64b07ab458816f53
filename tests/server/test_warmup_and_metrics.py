"""Warm-up, and the metrics page."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.serving import SleepingBackend, identity, infer, row, serving, slow, start
from trine.core.errors import ModelLoadError
from trine.server.metrics import MetricsPage, MetricsSettings
from trine.server.repository import Repository
from trine.server.statistics import Latencies

SAMPLE = """instance_group [{{ kind: KIND_CPU count: 2 }}]
  model_warmup [{{ name: "s" batch_size: 2 count: 3
    inputs {{ key: "IN" value {{ data_type: TYPE_FP32 dims: [1] {data} }} }} }}]"""


async def test_every_instance_is_warmed_up_before_the_model_is_ready(tmp_path: Path) -> None:
    folder = slow(tmp_path, "m", SAMPLE.format(data='input_data_file: "data"'))
    (folder / "warmup").mkdir()
    (folder / "warmup" / "data").write_bytes(np.float32([7]).tobytes())
    backend = SleepingBackend()
    async with serving(tmp_path, backend) as repository:
        assert backend.batches == [("m:0", [7.0, 7.0])] * 3 + [("m:1", [7.0, 7.0])] * 3
        statistics = repository.model("m").statistics
        assert (statistics.success.count, statistics.execution_count, statistics.pending) == (0, 0, 0)
        assert not repository.model("m").busy


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "give zero_data, random_data or input_data_file"),
        ('input_data_file: "none"', "none can't be read"),
        (
            'zero_data: true } } inputs { key: "IN2" value { data_type: TYPE_FP32 dims: [-1] zero_data: true',
            "must all be known",
        ),
    ],
)
async def test_a_warm_up_that_can_not_be_fails_the_load(tmp_path: Path, data: str, message: str) -> None:
    slow(tmp_path, "m", SAMPLE.format(data=data))
    with pytest.raises(ModelLoadError, match=message):
        async with serving(tmp_path):
            pass


async def test_a_warm_up_that_fails_fails_the_load(tmp_path: Path) -> None:
    slow(
        tmp_path, "m", SAMPLE.format(data="zero_data: true") + 'parameters { key: "fails" value { string_value: "1" } }'
    )
    with pytest.raises(ModelLoadError, match="failed to run warmup sample 's' on instance m_0_0: told to fail"):
        async with serving(tmp_path):
            pass


def values(repository: Repository, settings: MetricsSettings | None = None) -> dict[str, float]:
    """Every sample of the page by "name{labels}"; a name that occurs twice fails."""
    text = MetricsPage(repository, settings).render().decode()
    found: dict[str, float] = {}
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")]
    assert len(names) == len(set(names))
    assert names == [line.split()[2] for line in text.splitlines() if line.startswith("# HELP ")]
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            key = f"{sample.name}{{{labels}}}"
            assert key not in found
            found[key] = sample.value
    return found


async def test_the_page_agrees_with_what_happened(tmp_path: Path) -> None:
    delay = 'parameters { key: "delay_ms" value { string_value: "10" } }'
    slow(tmp_path, "m", "dynamic_batching { } " + delay + ' metric_tags { key: "team" value: "a\\"b" }')
    slow(tmp_path, "bad", 'parameters { key: "fails" value { string_value: "1" } }')
    identity(tmp_path)
    async with serving(tmp_path) as repository:
        await asyncio.gather(*(start(repository, "m", {"IN": row(i)}) for i in range(6)))
        with pytest.raises(Exception, match="told to fail"):
            await infer(repository, "bad", {"IN": row(1)})
        waiting = [start(repository, "m", {"IN": row(i)}) for i in range(10)]
        await asyncio.sleep(0.002)
        during = values(repository)
        await asyncio.gather(*waiting)
        found = values(repository)
        labels = '{model=m,team=a"b,version=1}'
        assert during["nv_inference_pending_request_count" + labels] > 0
        assert found["nv_inference_pending_request_count" + labels] == 0
        assert found["nv_inference_request_success_total" + labels] == 16
        assert found["nv_inference_count_total" + labels] == 16
        executions = repository.model("m").statistics.execution_count
        assert found["nv_inference_exec_count_total" + labels] == executions < 16
        assert found["nv_inference_request_duration_us_total" + labels] >= 160_000
        assert found["nv_inference_compute_infer_duration_us_total" + labels] >= 160_000
        assert found["nv_inference_request_summary_us_count" + labels] == 16
        quantile = '{model=m,quantile=0.5,team=a"b,version=1}'
        assert 9_000 < found["nv_inference_request_summary_us" + quantile] < 10_000_000
        for reason in ("REJECTED", "CANCELED", "BACKEND", "OTHER"):
            key = f"nv_inference_request_failure_total{{model=bad,reason={reason},version=1}}"
            assert found[key] == (reason == "BACKEND")
        assert found["nv_cpu_memory_total_bytes{}"] > found["nv_cpu_memory_used_bytes{}"] > 0
        assert 0 <= found["nv_cpu_utilization{}"] <= 1
        assert "nv_inference_count_total{model=identity,version=1}" in found
        few = values(repository, MetricsSettings(False, False, False))
        assert not any("duration" in name.replace("load_duration", "") or "summary" in name for name in few)
        assert not any("histogram" in name for name in few)


def test_percentiles_are_within_a_few_percent() -> None:
    latencies = Latencies(window=1000)
    assert all(value != value for value in latencies.quantiles())
    durations = np.random.default_rng(0).lognormal(13, 1, 900).astype(int)
    for duration in durations:
        latencies.add(int(duration))
    for share, found in zip((0.5, 0.9, 0.99), latencies.quantiles((0.5, 0.9, 0.99)), strict=True):
        assert found == pytest.approx(np.quantile(durations, share) / 1000, rel=0.05)
    for _ in range(3000):  # the window moves on
        latencies.add(5_000)
    assert latencies.quantiles((0.999,)) == [5.0]
    assert latencies.count == 3900
