"""The repository: modes, versions, swaps, failures, instances, loading on demand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest

from tests.server.serving import (
    SleepingBackend,
    identity,
    infer,
    row,
    scaling,
    scaling_model,
    serving,
    slow,
    start,
    write_model,
)
from trine.core.errors import ConfigurationError, ModelLoadError
from trine.server.errors import Code, ServerError
from trine.server.repository import IndexEntry, Repository, RepositorySettings

ONES = row(1, 1, 1, 1)


async def factor(repository: Repository, name: str, version: str = "") -> float:
    return float((await infer(repository, name, {"x": ONES}, model_version=version))["y"][0, 0])


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait, at most 10 s, until the condition holds."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to hold")


def states(repository: Repository) -> dict[tuple[str, str], str]:
    return {(entry.name, entry.version): entry.state for entry in repository.index()}


async def test_version_policies(tmp_path: Path) -> None:
    versions = {"1": 1.0, "2": 2.0, "3": 3.0, "10": 10.0}
    scaling(tmp_path, "latest", versions)
    scaling(tmp_path, "two", versions, "version_policy { latest { num_versions: 2 } }")
    scaling(tmp_path, "all", versions, "version_policy { all { } }")
    scaling(tmp_path, "some", versions, "version_policy { specific { versions: [1, 3] } }")
    (tmp_path / "latest" / "01").mkdir()
    (tmp_path / "latest" / "notes").mkdir()
    async with serving(tmp_path) as repository:
        ready = {name: repository.model(name).versions for name in ("latest", "two", "all", "some")}
        assert ready == {"latest": ["10"], "two": ["3", "10"], "all": ["1", "2", "3", "10"], "some": ["1", "3"]}
        assert await factor(repository, "latest") == 10
        assert await factor(repository, "some") == 3
        assert await factor(repository, "all", "2") == 2
        with pytest.raises(ServerError, match=r"^Request for unknown model: 'two' version 1 is not found$") as unknown:
            repository.model("two", "1")
        assert unknown.value.error_code is Code.NOT_FOUND
        with pytest.raises(ServerError, match=r"^Request for unknown model: 'none' is not found$"):
            repository.model("none")
        assert repository.ready


async def test_a_model_that_fails_names_the_reason_and_the_others_serve(tmp_path: Path) -> None:
    identity(tmp_path)
    write_model(tmp_path, "empty", 'backend: "onnxruntime"')
    folder = write_model(tmp_path, "corrupt", "")
    (folder / "1" / "model.onnx").write_bytes(b"this is no model")
    write_model(tmp_path, "typo", "max_batch_sise: 8")
    with pytest.raises(ModelLoadError, match="failed to load all models: "):
        async with serving(tmp_path):
            pass
    async with serving(tmp_path, exit_on_error=False) as repository:
        index = {entry.name: entry for entry in repository.index()}
        assert index["identity"] == IndexEntry("identity", "1", "READY", "")
        assert [index[name].state for name in ("corrupt", "empty", "typo")] == ["UNAVAILABLE"] * 3
        assert "model.onnx" in index["empty"].reason
        assert "config.pbtxt:1:1" in index["typo"].reason
        assert "Did you mean 'max_batch_size'?" in index["typo"].reason
        assert not repository.ready
        assert (await infer(repository, "identity", {"IN": ONES}))["OUT"].tolist() == ONES.tolist()
        with pytest.raises(ServerError, match="version 1 is not at ready state") as unready:
            repository.model("corrupt", "1")
        assert unready.value.error_code is Code.UNAVAILABLE
    async with serving(tmp_path, exit_on_error=False, strict_readiness=False) as repository:
        assert repository.ready


async def test_explicit_mode(tmp_path: Path) -> None:
    scaling(tmp_path, "a", {"1": 2.0})
    scaling(tmp_path, "b", {"1": 3.0})
    async with serving(tmp_path, control_mode="explicit", load_models=("b",)) as repository:
        assert repository.index() == [IndexEntry("a", "", "", ""), IndexEntry("b", "1", "READY", "")]
        await repository.load("a")
        assert await factor(repository, "a") == 2
        await repository.unload("a")
        await eventually(lambda: states(repository)["a", "1"] == "UNAVAILABLE")
        assert repository.index()[0].reason == "unloaded"
        assert repository.ready
        with pytest.raises(ServerError, match="'a' has no available versions"):
            repository.model("a")
        with pytest.raises(ServerError, match="failed to load 'none', failed to poll from model repository"):
            await repository.load("none")
        await repository.unload("none")
        await repository.load("a")
        assert await factor(repository, "a") == 2


async def test_loading_is_refused_in_other_modes(tmp_path: Path) -> None:
    identity(tmp_path)
    async with serving(tmp_path) as repository:
        for attempt in (repository.load("identity"), repository.unload("identity")):
            with pytest.raises(ServerError) as refused:
                await attempt
            assert refused.value.error_code is Code.UNAVAILABLE
            assert refused.value.message == "explicit model load / unload is not allowed if polling is enabled"


async def test_load_with_config_and_files(tmp_path: Path) -> None:
    scaling(tmp_path, "m", {"1": 2.0})
    async with serving(tmp_path, control_mode="explicit") as repository:
        await repository.load("m", json.dumps({"max_batch_size": 3}))
        assert repository.model("m").config.max_batch_size == 3
        config = json.dumps({"backend": "onnxruntime", "max_batch_size": 5, "version_policy": {"all": {}}})
        files = {"7/model.onnx": scaling_model(7.0), "9/model.onnx": scaling_model(9.0)}
        await repository.load("m", config, files)
        assert repository.model("m").versions == ["7", "9"]
        assert await factor(repository, "m", "7") == 7
        await repository.load("fresh", config, {"1/model.onnx": scaling_model(4.0)})
        assert await factor(repository, "fresh") == 4
        with pytest.raises(ServerError, match="config override"):
            await repository.load("m", None, files)
        for path in ("../model.onnx", "/etc/passwd", "1/../../x", ""):
            with pytest.raises(ServerError, match="must lie within the model's folder"):
                await repository.load("m", config, {path: b""})
        with pytest.raises(
            ServerError, match=r"no field named .?max_batch_sise.* Did you mean 'max_batch_size'"
        ) as typo:
            await repository.load("m", json.dumps({"max_batch_sise": 3}))
        assert typo.value.error_code is Code.INVALID_ARGUMENT
        assert await factor(repository, "m", "9") == 9  # what was served still is
        await repository.load("m")
        assert await factor(repository, "m") == 2


async def test_a_failed_reload_keeps_what_is_served(tmp_path: Path) -> None:
    folder = scaling(tmp_path, "m", {"1": 2.0})
    async with serving(tmp_path, control_mode="explicit", load_models=("m",)) as repository:
        (folder / "1" / "model.onnx").write_bytes(b"broken")
        with pytest.raises(ServerError, match=r"^failed to load 'm', .*ONNX Runtime can't load"):
            await repository.load("m")
        assert await factor(repository, "m") == 2
        entry = repository.index()[0]
        assert entry.state == "READY"
        assert "can't be loaded" in entry.reason
        (folder / "1" / "model.onnx").write_bytes(scaling_model(3.0))
        await repository.load("m")
        assert await factor(repository, "m") == 3
        assert repository.index()[0].reason == ""


async def test_swaps_under_load_lose_no_request(tmp_path: Path) -> None:
    folder = scaling(tmp_path, "m", {"1": 1.0}, "max_batch_size: 8 dynamic_batching { }")
    async with serving(tmp_path, control_mode="explicit", load_models=("m",)) as repository:
        stop = False
        answers: list[float] = []

        async def client() -> None:
            while not stop:
                answers.append(await factor(repository, "m"))

        clients = [asyncio.create_task(client()) for _ in range(8)]
        for number in range(2, 22):
            (folder / "1" / "model.onnx").write_bytes(scaling_model(float(number)))
            await repository.load("m")
            assert await factor(repository, "m") == number
        stop = True
        await asyncio.gather(*clients)
        assert answers == sorted(answers)  # nobody got an older model's answer after a newer one's
        assert len(answers) > 100
        await eventually(lambda: not repository._leaving)


async def test_an_unload_lets_running_requests_finish(tmp_path: Path) -> None:
    slow(tmp_path, "m", 'parameters { key: "delay_ms" value { string_value: "40" } }')
    async with serving(tmp_path, control_mode="explicit", load_models=("m",)) as repository:
        running = [start(repository, "m", {"IN": row(i)}) for i in range(3)]
        await repository.unload("m")
        assert states(repository)["m", "1"] == "UNLOADING"
        assert [(await future)[0].outputs[0].array.item() for future in running] == [0, 1, 2]
        await eventually(lambda: states(repository)["m", "1"] == "UNAVAILABLE")


async def test_poll_mode_follows_the_folder(tmp_path: Path) -> None:
    folder = scaling(tmp_path, "m", {"1": 1.0}, "max_batch_size: 4")
    async with serving(tmp_path, control_mode="poll", poll_seconds=0.05) as repository:
        scaling(tmp_path, "new", {"1": 4.0})
        await eventually(lambda: repository.is_ready("new"))
        (folder / "2").mkdir()
        (folder / "2" / "model.onnx").write_bytes(scaling_model(2.0)[:40])  # somebody is writing it
        await eventually(
            lambda: "can't be loaded" in repository.index()[0].reason or states(repository).get(("m", "2"))
        )
        assert await factor(repository, "m") == 1
        (folder / "2" / "model.onnx").write_bytes(scaling_model(2.0))
        await eventually(lambda: repository.model("m").version == "2")
        assert await factor(repository, "m") == 2
        await eventually(lambda: ("m", "1") not in states(repository) or states(repository)["m", "1"] == "UNAVAILABLE")
        (folder / "2" / "model.onnx").unlink()  # a file that is gone takes nothing with it
        (folder / "config.pbtxt").write_text("max_batch_size: banana")
        await asyncio.sleep(0.3)
        assert await factor(repository, "m") == 2
        shutil.rmtree(folder)  # a folder that is gone does
        await eventually(lambda: not repository.is_ready("m"))
        assert repository.is_ready("new")
        assert repository.ready


async def test_instances_come_and_go_in_place(tmp_path: Path) -> None:
    delay = 'parameters {{ key: "delay_ms" value {{ string_value: "30" }} }}'
    config = f"instance_group [{{{{ kind: KIND_CPU count: {{}} }}}}] {delay}"
    slow(tmp_path, "m", config.format(1))
    backend = SleepingBackend()
    async with serving(tmp_path, backend, control_mode="explicit", load_models=("m",)) as repository:
        model = repository.model("m")
        waiting = [start(repository, "m", {"IN": row(i)}) for i in range(9)]
        slow(tmp_path, "m", config.format(3))
        await repository.load("m")
        assert repository.model("m") is model
        await asyncio.gather(*waiting)
        assert backend.most_concurrent == 3
        assert model.config.instance_group[0].count == 3
        slow(tmp_path, "m", config.format(2))
        await repository.load("m")
        backend.most_concurrent = 0
        await asyncio.gather(*(start(repository, "m", {"IN": row(i)}) for i in range(6)))
        assert backend.most_concurrent == 2
        assert model.statistics.success.count == 15


async def demand(repository: Repository, name: str) -> None:
    """What a protocol does that is asked for a model."""
    if repository.wants_load(name):
        loaded = asyncio.Event()
        repository.load_then(name, loaded.set)
        await loaded.wait()


async def test_models_are_loaded_on_demand_and_the_least_used_leaves(tmp_path: Path) -> None:
    for number, name in enumerate("abc", 1):
        scaling(tmp_path, name, {"1": float(number)})
    (write_model(tmp_path, "broken", "") / "1" / "model.onnx").write_bytes(b"nonsense")
    async with serving(tmp_path, control_mode="explicit", max_loaded=2) as repository:
        for name, expected in (("a", 1), ("b", 2), ("a", 1), ("c", 3)):
            await demand(repository, name)
            assert await factor(repository, name) == expected
            await asyncio.sleep(0.005)
        assert [repository.is_ready(name) for name in "abc"] == [True, False, True]
        await asyncio.gather(*(demand(repository, "b") for _ in range(5)))
        assert await factor(repository, "b") == 2
        assert [repository.is_ready(name) for name in "abc"] == [False, True, True]
        await demand(repository, "broken")
        assert not repository.wants_load("broken")  # for a while: whoever asks gets the error
        assert not repository.wants_load("none")
        with pytest.raises(ServerError, match="'broken' has no available versions"):
            repository.model("broken")


async def test_a_busy_model_is_not_evicted(tmp_path: Path) -> None:
    slow(tmp_path, "busy", 'parameters { key: "delay_ms" value { string_value: "500" } }')
    scaling(tmp_path, "a", {"1": 1.0})
    async with serving(tmp_path, control_mode="explicit", max_loaded=1) as repository:
        await demand(repository, "busy")
        running = start(repository, "busy", {"IN": row(5)})
        await demand(repository, "a")
        assert repository.is_ready("busy")
        assert (await running)[0].outputs[0].array.item() == 5


async def test_the_first_of_two_with_the_same_name_is_served_where_that_is_allowed(tmp_path: Path) -> None:
    for number, folder in enumerate(("one", "two"), 1):
        scaling(tmp_path / folder, "both", {"1": float(number)})
    directories = (str(tmp_path / "one"), str(tmp_path / "two"))
    repository = Repository(RepositorySettings(directories, namespacing=True))
    await repository.start()
    assert await factor(repository, "both") == 1
    await repository.close(1.0)


async def test_the_same_name_in_two_repositories_is_refused(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        identity(tmp_path / folder, "both")
        identity(tmp_path / folder, folder)
    repository = Repository(RepositorySettings((str(tmp_path / "one"), str(tmp_path / "two")), exit_on_error=False))
    await repository.start()
    index = {entry.name: entry for entry in repository.index()}
    assert [index[name].state for name in ("one", "two", "both")] == ["READY", "READY", "UNAVAILABLE"]
    assert "more than one repository" in index["both"].reason
    await repository.close(1.0)
    with pytest.raises(ConfigurationError, match="is not a folder"):
        await Repository(RepositorySettings((str(tmp_path / "nothing"),))).start()


async def test_a_repository_behind_a_url(tmp_path: Path) -> None:
    scaling(tmp_path, "m", {"1": 2.0}, "max_batch_size: 4")
    remote = fsspec.filesystem("memory")
    remote.put(str(tmp_path / "m"), "/models/m", recursive=True)
    repository = Repository(RepositorySettings(("memory://models",), control_mode="poll", poll_seconds=0.05))
    try:
        await repository.start()
        assert await factor(repository, "m") == 2
        remote.pipe_file("/models/m/2/model.onnx", scaling_model(6.0))
        await eventually(lambda: repository.model("m").version == "2")
        assert await factor(repository, "m") == 6
        remote.rm("/models/m", recursive=True)
        await eventually(lambda: not repository.is_ready("m"))
    finally:
        await repository.close(1.0)
        with contextlib.suppress(FileNotFoundError):
            remote.rm("/models", recursive=True)


async def test_closing_drains(tmp_path: Path) -> None:
    slow(tmp_path, "m", 'parameters { key: "delay_ms" value { string_value: "50" } }')
    async with serving(tmp_path) as repository:
        model = repository.model("m")
        running = [start(repository, "m", {"IN": row(i)}) for i in range(3)]
        closing = asyncio.create_task(repository.close(5.0))
        await asyncio.sleep(0.01)
        with pytest.raises(
            ServerError, match=r"^Server is stopping, scheduler for model has stopped accepting"
        ) as late:
            start_on(model)
        assert late.value.error_code is Code.UNAVAILABLE
        assert [(await future)[0].outputs[0].array.item() for future in running] == [0, 1, 2]
        await closing
        assert not repository.live


def start_on(model: object) -> None:
    from trine.server.request import InferRequest
    from trine.server.tensors import Tensor

    model.submit(InferRequest("m", {"IN": Tensor.of("IN", row(1))}, lambda response: None))  # type: ignore[attr-defined]


async def test_what_waits_at_the_end_of_the_drain_is_refused(tmp_path: Path) -> None:
    slow(tmp_path, "m", 'parameters { key: "delay_ms" value { string_value: "150" } }')
    async with serving(tmp_path) as repository:
        running, waiting = start(repository, "m", {"IN": row(1)}), start(repository, "m", {"IN": row(2)})
        await asyncio.sleep(0.01)
        await repository.close(0.03)
        with pytest.raises(ServerError, match="has not been computed in time"):
            await waiting
        assert (await running)[0].outputs[0].array.item() == 1


async def test_the_checksum_agent_refuses_what_was_tampered_with(tmp_path: Path) -> None:
    import hashlib

    folder = scaling(tmp_path, "m", {"1": 2.0})
    digest = hashlib.md5((folder / "1" / "model.onnx").read_bytes()).hexdigest()
    (folder / "config.pbtxt").write_text(
        f"""model_repository_agents {{ agents [{{ name: "checksum"
        parameters {{ key: "MD5:1/model.onnx" value: "{digest}" }} }}] }}"""
    )
    async with serving(tmp_path) as repository:
        assert await factor(repository, "m") == 2
    (folder / "1" / "model.onnx").write_bytes(scaling_model(3.0))
    async with serving(tmp_path, exit_on_error=False) as repository:
        assert "Mismatched MD5 hash for file 1/model.onnx" in repository.index()[0].reason


async def test_labels(tmp_path: Path) -> None:
    folder = identity(tmp_path)
    config = (folder / "config.pbtxt").read_text()
    (folder / "config.pbtxt").write_text(config.replace('name: "OUT"', 'name: "OUT" label_filename: "labels.txt"'))
    (folder / "labels.txt").write_text("cat\ndog\n")
    async with serving(tmp_path) as repository:
        assert repository.model("identity").labels("OUT") == ["cat", "dog"]
        assert repository.model("identity").labels("other") == []


async def test_datatypes_pass_unchanged(tmp_path: Path) -> None:
    for datatype in ("TYPE_BOOL", "TYPE_FP16", "TYPE_UINT64"):
        identity(tmp_path, datatype.lower(), datatype=datatype)
    async with serving(tmp_path) as repository:
        for name, dtype in (("type_bool", np.bool_), ("type_fp16", np.float16), ("type_uint64", np.uint64)):
            given = np.array([[0, 1, 1, 0]], dtype)
            answer = await infer(repository, name, {"IN": given})
            assert answer["OUT"].dtype == dtype
            assert answer["OUT"].tolist() == given.tolist()
