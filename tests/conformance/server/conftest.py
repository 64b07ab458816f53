"""One server for the whole run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.server.v2 import KINDS, Client, RunningServer, write_repository
from trine.server.application import ServerSettings
from trine.server.repository import RepositorySettings


@pytest.fixture(scope="session")
def repository_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_repository(root)
    return root


@pytest.fixture(scope="session")
def v2(repository_path: Path) -> Iterator[RunningServer]:
    repository = RepositorySettings(
        directories=(str(repository_path),), control_mode="explicit", load_models=("*",), drain_seconds=2.0
    )
    server = RunningServer(repository, ServerSettings(client_shared_memory=True, max_body=8 << 20, drain_seconds=2.0))
    yield server
    server.close()


@pytest.fixture(params=KINDS)
def client(request: pytest.FixtureRequest, v2: RunningServer) -> Iterator[Client]:
    made = Client(request.param, v2)
    yield made
    made.close()
