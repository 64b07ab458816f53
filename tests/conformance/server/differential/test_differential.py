"""The same requests to real Triton and to Trine: the same status, tensors and statistics.

Triton's answers lie in `triton.json`; with TRITON_PYTHON set to a Python that has nvidia-pytriton they are taken from a
running Triton instead. What differs on purpose says why, and docs/how-to says it too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conformance.server.differential.cases import COUNTED_DIFFERENTLY, Case, all_cases
from tests.conformance.server.differential.models import write_models
from tests.conformance.server.differential.run import RECORDED, Target, run, run_triton
from tests.conformance.server.v2 import RunningServer
from trine.server.application import ServerSettings
from trine.server.repository import RepositorySettings

CASES = all_cases()
_OWN = ("version",)
"""Members of answers that say which server it is."""


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    python = os.environ.get("TRITON_PYTHON")
    found: dict[str, Any] = run_triton(python) if python else json.loads(RECORDED.read_text())
    return found


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    root = tmp_path_factory.mktemp("same")
    write_models(root)
    repository = RepositorySettings(
        directories=(str(root),), control_mode="explicit", load_models=("*",), drain_seconds=2.0
    )
    server = RunningServer(repository, ServerSettings(client_shared_memory=True, drain_seconds=2.0))
    # Through JSON, as the recorded answers came.
    yield json.loads(json.dumps(run(Target(server.http, server.grpc))))
    server.close()


def comparable(case: Case, answer: dict[str, Any]) -> dict[str, Any]:
    """Without what names the server, and without the texts that nobody parses."""
    made = dict(answer)
    body = made.get("body")
    if isinstance(body, dict):
        body = {key: value for key, value in body.items() if not (key in _OWN and "extensions" in body)}
        if "error" in body and (case.difference or not case.text):
            body = {"error": "…"}
        made["body"] = body
    return made


def test_there_are_enough() -> None:
    assert len(CASES) >= 300
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_answer(case: Case, expected: dict[str, Any], given: dict[str, Any]) -> None:
    theirs = comparable(case, expected["answers"][case.name])
    ours = comparable(case, given["answers"][case.name])
    if case.difference:
        assert ours["status"] in (400, "INVALID_ARGUMENT"), ours
        assert ours["status"] != theirs["status"], f"no difference any more: {case.difference}"
    else:
        assert ours == theirs


def test_same_statistics(expected: dict[str, Any], given: dict[str, Any]) -> None:
    ours, theirs = given["statistics"], expected["statistics"]
    assert set(ours) == set(theirs)
    different = {
        (model, part): (count, ours[model][part])
        for model, counts in theirs.items()
        for part, count in counts.items()
        if count != ours[model][part]
    }
    assert different == {key: (count, own) for key, (count, own, _) in COUNTED_DIFFERENTLY.items()}
