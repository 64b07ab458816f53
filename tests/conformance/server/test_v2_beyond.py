"""What Triton does not have: loading on demand, traffic splits and explanations, by the commands and the clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http

from tests.conformance.server.v2 import KINDS, Client, RunningServer
from tests.server.serving import identity, scaling
from trine.cli.main import main
from trine.server.application import ServerSettings
from trine.server.repository import RepositorySettings


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    root = tmp_path_factory.mktemp("models")
    scaling(root, "scale", {"1": 1.0, "2": 2.0}, "max_batch_size: 8 version_policy { all { } } dynamic_batching { }")
    running = start(root, load_models=("*",))
    yield running
    running.close()


def start(root: Path, **settings: object) -> RunningServer:
    repository = RepositorySettings(directories=(str(root),), control_mode="explicit", drain_seconds=2.0, **settings)  # type: ignore[arg-type]
    return RunningServer(repository, ServerSettings(drain_seconds=2.0))


def ask(client: Client, model: str, name: str, **options: object) -> float:
    """The first element of the answer to ones."""
    inputs = [client.input(name, np.ones((1, 4), np.float32), "FP32")]
    output = "y" if name == "x" else "OUT"
    return float(client.infer(model, inputs, **options).as_numpy(output)[0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_models_load_when_they_are_asked_for(tmp_path: Path, kind: str) -> None:
    scaling(tmp_path, "one", {"1": 3.0}, "max_batch_size: 4")
    identity(tmp_path, "two")
    running = start(tmp_path, max_loaded=1)
    client = Client(kind, running)
    try:
        for _ in range(2):
            assert ask(client, "one", "x") == 3
            assert ask(client, "two", "IN") == 1
        assert client.described("get_model_metadata", "one")["name"] == "one"
        with pytest.raises(Exception, match="Request for unknown model: 'none' is not found"):
            ask(client, "none", "x")
    finally:
        client.close()
        running.close()


def test_the_command_splits_traffic(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*arguments: str) -> str:
        assert main(["traffic", "scale", *arguments, "--url", server.http]) == 0
        return capsys.readouterr().out

    client = Client("http", server)
    assert "all requests go to the newest version" in command()
    assert "version 2: 10 %, 0 requests so far" in command("1=90", "2=10")
    answers = [ask(client, "scale", "x") for _ in range(200)]
    assert 10 <= answers.count(2.0) <= 30
    assert f"version 2: 10 %, {answers.count(2.0)} requests so far" in command()
    sticky = {ask(client, "scale", "x", headers={"trine-traffic-key": "user 7"}) for _ in range(20)}
    assert len(sticky) == 1
    assert ask(client, "scale", "x", headers={"trine-traffic-version": "2"}) == 2
    command("--promote", "1")
    assert {ask(client, "scale", "x") for _ in range(10)} == {1.0}
    assert json.loads(command("--rollback", "--json"))["weights"] == {"1": 90.0, "2": 10.0}
    command("--off")
    assert ask(client, "scale", "x") == 2
    assert main(["traffic", "scale", "1=50", "9=50", "--url", server.http]) == 1
    assert "traffic can't go to version 9" in capsys.readouterr().err
    client.close()


def test_the_command_explains_a_request(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    client = tritonclient.http.InferenceServerClient(server.http)
    given = tritonclient.http.InferInput("x", [1, 4], "FP32")
    given.set_data_from_numpy(np.ones((1, 4), np.float32))
    client.infer("scale", [given], request_id="to explain")
    assert main(["explain", "to explain", "--url", server.http]) == 0
    out = capsys.readouterr().out
    for part in ("scale version 2", "an instance was free", "alone: 1 rows, 1 its own", "scale_"):
        assert part in out.replace("scale version", "scale version")
    assert main(["explain", "never sent", "--url", server.http]) == 1
    assert "knows no request with the id 'never sent'" in capsys.readouterr().out
    client.close()
