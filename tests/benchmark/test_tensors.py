"""`trine bench` on a running server of the v2 protocol: both protocols, both kinds of load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conformance.server.v2 import RunningServer, tensor_text, write_model
from trine.cli.main import main
from trine.server.application import ServerSettings
from trine.server.repository import RepositorySettings


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    root = tmp_path_factory.mktemp("measured")
    for name, datatype in (("numbers", "FP32"), ("texts", "BYTES")):
        tensors = tensor_text("input", [("INPUT0", datatype, [-1])]) + tensor_text(
            "output", [("OUTPUT0", datatype, [-1])]
        )
        write_model(root, name, f'backend: "identity"\nmax_batch_size: 4\n{tensors}')
    running = RunningServer(
        RepositorySettings(directories=(str(root),), drain_seconds=1.0), ServerSettings(drain_seconds=1.0)
    )
    yield running
    running.close()


def bench(
    server: RunningServer, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, list[dict[str, Any]]]:
    command = ["bench", *arguments, "--url", f"http://{server.http}", "--grpc-url", f"grpc://{server.grpc}"]
    code = main([*command, "--seconds", "0.3", "--json", "-"])
    return code, json.loads(capsys.readouterr().out)["levels"]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("shape", [3, 200_000])
def test_levels_of_concurrency(
    server: RunningServer, capsys: pytest.CaptureFixture[str], protocol: str, shape: int
) -> None:
    arguments = [
        "numbers",
        "--protocol",
        protocol,
        "--shape",
        f"INPUT0:{shape}",
        "--batch",
        "2",
        "--concurrency",
        "1,4",
    ]
    code, levels = bench(server, capsys, *arguments)
    assert code == 0
    assert [level["load"] for level in levels] == ["1 clients", "4 clients"]
    for level in levels:
        assert level["failed"] == 0
        assert level["requests"] > 0
        assert level["rows_per_s"] == pytest.approx(2 * level["requests_per_s"], rel=0.01)
        assert 0 < level["p50_ms"] <= level["p99_ms"]
        assert level["server_compute_infer_us"] > 0


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_rates(server: RunningServer, capsys: pytest.CaptureFixture[str], protocol: str) -> None:
    arguments = ["texts", "--protocol", protocol, "--shape", "INPUT0:2", "--request-rate", "50,100"]
    code, levels = bench(server, capsys, *arguments)
    assert code == 0
    assert [level["load"] for level in levels] == ["50/s", "100/s"]
    assert all(level["requests"] > 0 and level["failed"] == 0 for level in levels)


def test_refusals_are_counted(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    """A batch that the model does not take: every request fails, and the exit code says so."""
    for protocol in ("http", "grpc"):
        arguments = ["numbers", "--protocol", protocol, "--shape", "INPUT0:3", "--batch", "9", "--request-rate", "50"]
        code, levels = bench(server, capsys, *arguments)
        assert code == 1
        assert levels[0]["failed"] > 0
        assert levels[0]["requests"] == 0


def test_what_is_missing_is_said(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://{server.http}"
    assert main(["bench", "numbers", "--url", url, "--protocol", "http"]) == 1
    assert "--shape INPUT0:" in capsys.readouterr().err
    assert main(["bench", "nobody", "--url", url, "--protocol", "http"]) == 1
    assert "'nobody' is not found" in capsys.readouterr().err
