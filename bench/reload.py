"""Models that are swapped under load, and traffic that is split: failed requests, latency, shares.

    python bench/reload.py                      200 swaps for each of identity, onnx, python; 32 clients over HTTP
    python bench/reload.py --split              10,000 requests over HTTP and gRPC on two versions, 90 to 10

Latencies before the swaps and during them come from the same clients in the same run: the same seconds of load without
swaps, then with them. A swap changes the model's file and loads it; every answer is checked. For the split, versions
answer with their number; each key of a sticky request must meet one version, and shares must lie within three standard
deviations while weights are changed, promoted and rolled back.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import importlib
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import serving

PYTHON_MODEL = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor("OUTPUT0", pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy())]
            )
            for request in requests
        ]
"""
TENSORS = """
max_batch_size: 32
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ 16 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 16 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
dynamic_batching { }
"""


def write_onnx(path: Path, added: float = 0.0) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 16]) for name in ("INPUT0", "OUTPUT0")]
    node = helper.make_node("Add", ["INPUT0", "added"], ["OUTPUT0"])
    graph = helper.make_graph(
        [node], "add", values[:1], values[1:], [numpy_helper.from_array(np.float32(added), "added")]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))


def write_model(root: Path, backend: str) -> Path:
    """A model named as its back end; returns the file that a swap changes."""
    folder = root / backend / "1"
    folder.mkdir(parents=True)
    name = "onnxruntime" if backend == "onnx" else backend
    (folder.parent / "config.pbtxt").write_text(f'backend: "{name}"\n{TENSORS}')
    if backend == "onnx":
        write_onnx(folder / "model.onnx")
        return folder / "model.onnx"
    if backend == "python":
        (folder / "model.py").write_text(PYTHON_MODEL)
        return folder / "model.py"
    (folder / "data").write_text("")
    return folder / "data"


class Client:
    """A connection that sends one request after the other."""

    def __init__(self, port: int, model: str, value: float) -> None:
        data = np.full((1, 16), value, np.float32).tobytes()
        tensor = {"name": "INPUT0", "shape": [1, 16], "datatype": "FP32", "parameters": {"binary_data_size": 64}}
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        self._port = port
        self._expected = data
        self._request = (
            f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: {len(head)}\r\n"
            f"Content-Length: {len(head) + len(data)}\r\n\r\n"
        ).encode() + head + data  # fmt: skip
        self.failures: list[bytes] = []
        self.latencies: list[tuple[float, float]] = []

    async def run(self, ended: asyncio.Event) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        while not ended.is_set():
            began = time.perf_counter()
            writer.write(self._request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[-1].split(b"\r\n")[0])
            body = await reader.readexactly(length)
            if not head.startswith(b"HTTP/1.1 200") or not body.endswith(self._expected):
                self.failures.append(body)
            self.latencies.append((began, time.perf_counter() - began))
        writer.close()


async def post(port: int, path: str, body: Any = None) -> None:
    """A call of the repository's API, from a thread. RuntimeError: the answer is not 200."""

    def call() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", path, json.dumps(body or {}))
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        if answer.status != 200:
            raise RuntimeError(text.decode())

    await asyncio.to_thread(call)


async def swaps(port: int, backend: str, file: Path, count: int, clients: int) -> dict[str, Any]:
    load = [Client(port, backend, float(index)) for index in range(clients)]
    ended = asyncio.Event()
    tasks = [asyncio.create_task(client.run(ended)) for client in load]
    await asyncio.sleep(1.0)
    began = time.perf_counter()
    for swap in range(count):
        stamp = time.time_ns() + swap
        os.utime(file, ns=(stamp, stamp))
        await post(port, f"/v2/repository/models/{backend}/load")
    swapped = time.perf_counter()
    await asyncio.sleep(max(3.0, (swapped - began) / 2))
    over = time.perf_counter()
    ended.set()
    await asyncio.gather(*tasks)

    def between(first: float, last: float) -> np.ndarray[Any, Any]:
        return np.array([took for client in load for start, took in client.latencies if first <= start < last]) * 1e3

    during, calm = between(began, swapped), between(swapped + 0.5, over)
    failures = [failure for client in load for failure in client.failures]
    p99, calm_p99 = float(np.percentile(during, 99)), float(np.percentile(calm, 99))
    return {
        "model": backend,
        "swaps": count,
        "seconds": round(swapped - began, 1),
        "requests": len(during),
        "failed": len(failures),
        "first_failure": failures[0].decode("utf-8", "replace")[:200] if failures else None,
        "p50_ms": [round(float(np.percentile(each, 50)), 2) for each in (calm, during)],
        "p99_ms": [round(calm_p99, 2), round(p99, 2)],
        "p99_ratio": round(p99 / calm_p99, 2),
    }


# Split traffic.


def within_three_sigma(name: str, counts: Counter[int], weights: dict[int, float]) -> dict[str, Any]:
    total = sum(counts.values())
    shares = {version: counts[version] / total for version in weights}
    sigmas = {
        version: abs(shares[version] - weight) / math.sqrt(weight * (1 - weight) / total)
        for version, weight in weights.items()
    }
    assert set(counts) <= set(weights), counts
    assert max(sigmas.values()) < 3, (name, shares, sigmas)
    return {"what": name, "requests": total, "shares": shares, "sigmas": round(max(sigmas.values()), 2)}


async def split(port: int, protocol: str, count: int) -> list[dict[str, Any]]:
    """Weights, sticky keys, promotion and roll-back of model `split`, whose versions add their number."""
    module = importlib.import_module(f"tritonclient.{protocol}")

    def ask(requests: int, key: Callable[[int], str] | None = None) -> Counter[int]:
        client = module.InferenceServerClient(f"127.0.0.1:{port if protocol == 'http' else port + 1}")
        tensor = module.InferInput("INPUT0", [1, 16], "FP32")
        tensor.set_data_from_numpy(np.zeros((1, 16), np.float32))
        counts: Counter[int] = Counter()
        for index in range(requests):
            headers = {"trine-traffic-key": key(index)} if key is not None else None
            answer = client.infer("split", [tensor], headers=headers)
            version = int(answer.as_numpy("OUTPUT0")[0, 0])
            counts[version] += 1
        client.close()
        return counts

    path = "/v2/models/split/traffic"
    await post(port, path, {"weights": {"1": 90, "2": 10}})
    found = [within_three_sigma(f"{protocol} 90:10", await asyncio.to_thread(ask, count), {1: 0.9, 2: 0.1})]
    counts = await asyncio.to_thread(ask, count, lambda index: f"user-{index}")
    found.append(within_three_sigma(f"{protocol} 90:10, each request another key", counts, {1: 0.9, 2: 0.1}))
    for user in range(50):
        seen = await asyncio.to_thread(ask, 10, lambda _, user=user: f"user-{user}")  # type: ignore[misc]
        assert len(seen) == 1, f"user-{user} met two versions"
    found.append({"what": f"{protocol} sticky keys", "requests": 500, "keys": 50})
    running = asyncio.create_task(asyncio.to_thread(ask, count // 2))
    while not running.done():
        await post(port, path, {"weights": {"2": 100}})
        await asyncio.sleep(0.05)
        await post(port, path, {"rollback": True})
        await asyncio.sleep(0.05)
    counts = await running  # raises where a request failed
    found.append({"what": f"{protocol} promote and roll back", "requests": sum(counts.values()), "shares": counts})
    return found


async def main(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        repository = root / "models"
        backends = arguments.backends.split(",")
        files = {backend: write_model(repository, backend) for backend in backends}
        for version in ("1", "2"):
            (repository / "split" / version).mkdir(parents=True)
            write_onnx(repository / "split" / version / "model.onnx", float(version))
        policy = "version_policy { all { } }\n"
        (repository / "split" / "config.pbtxt").write_text(f'backend: "onnxruntime"\n{policy}{TENSORS}')
        port = arguments.port
        command = [sys.executable, "-m", "trine.cli.main", "serve", "--model-repository", str(repository)]
        command += ["--model-control-mode", "explicit", "--load-model", "*", "--port", str(port)]
        with serving.running("trine", command, port, port + 1, root / "log"):
            if arguments.split:
                for protocol in ("http", "grpc"):
                    found += await split(port, protocol, arguments.requests)
            else:
                for backend in backends:
                    found.append(await swaps(port, backend, files[backend], arguments.swaps, arguments.clients))
                    print(json.dumps(found[-1]), flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="identity,onnx,python")
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--split", action="store_true", help="measure split traffic in place of swaps")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--port", type=int, default=18400)
    given = parser.parse_args()
    results = asyncio.run(main(given))
    if given.split:
        for result in results:
            print(json.dumps(result))
