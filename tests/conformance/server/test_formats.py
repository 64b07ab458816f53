"""Six networks as plans, as ONNX, as ONNX compiled when loaded, and as TorchScript, side by side: same answers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import trine.graph as tg
from tests.conformance.server.v2 import Client, RunningServer
from tests.graph.networks import NETWORKS, arguments, export, network
from trine.server.application import ServerSettings
from trine.server.repository import RepositorySettings

FORMATS = ("plan", "onnx", "compiled", "script")
COMPILED = 'optimization { execution_accelerators { cpu_execution_accelerator : [ { name : "trine" } ] } }'


def write(root: Path, name: str) -> None:
    """The network's four folders; only TorchScript, which has no names or shapes, needs a configuration."""
    folders = {kind: root / f"{name}_{kind}" / "1" for kind in FORMATS}
    for folder in folders.values():
        folder.mkdir(parents=True)
    export(name, folders["onnx"] / "model.onnx")
    (folders["compiled"] / "model.onnx").write_bytes((folders["onnx"] / "model.onnx").read_bytes())
    (folders["compiled"].parent / "config.pbtxt").write_text(COMPILED)
    tg.build(folders["onnx"] / "model.onnx", budget=1).save(folders["plan"] / "model.plan")
    (folders["plan"].parent / "config.pbtxt").write_text('platform: "tensorrt_plan"')
    given = arguments(name, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(network(name), given)
    script.save(str(folders["script"] / "model.pt"))
    result = script(*given)
    tensors = [("input", f"INPUT__{i}", tensor) for i, tensor in enumerate(given)] + [("output", "OUTPUT__0", result)]
    lines = [f'{kind} {{ name: "{key}" {described(tensor)} }}' for kind, key, tensor in tensors]
    (folders["script"].parent / "config.pbtxt").write_text("\n".join(["max_batch_size: 4", *lines]))


def described(tensor: torch.Tensor) -> str:
    datatype = {torch.float32: "TYPE_FP32", torch.int64: "TYPE_INT64"}[tensor.dtype]
    return f"data_type: {datatype} dims: {list(tensor.shape[1:])}"


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    root = tmp_path_factory.mktemp("formats")
    for name in NETWORKS:
        write(root / "models", name)
    settings = {"onnxruntime": {"cache-directory": str(root / "plans")}}
    repository = RepositorySettings(directories=(str(root / "models"),), backend_settings=settings)
    server = RunningServer(repository, ServerSettings())
    assert len(list((root / "plans").glob("*.plan"))) == len(NETWORKS)
    yield server
    server.close()


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("name", NETWORKS)
def test_same_answers(formats: RunningServer, kind: str, name: str) -> None:
    client = Client(kind, formats)
    for batch in (1, 3):
        given = arguments(name, batch)
        with torch.inference_mode():
            expected = network(name)(*given).numpy()
        for form in FORMATS:
            names = ["INPUT__{}", "OUTPUT__0"] if form == "script" else ["input_{}", "output"]
            inputs = []
            for index, tensor in enumerate(given):
                datatype = "INT64" if tensor.dtype == torch.int64 else "FP32"
                inputs.append(client.input(names[0].format(index), tensor.numpy(), datatype))
            answer = client.call("infer", f"{name}_{form}", inputs).as_numpy(names[1])
            np.testing.assert_allclose(answer, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max(), err_msg=form)
    client.close()
