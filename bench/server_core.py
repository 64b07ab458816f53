"""What a request costs between `ServedModel.submit` and its response: validation, batching, execution, statistics.

    python bench/server_core.py

Two models, FP32[16] each: `identity`, and a small ONNX perceptron (16 → 64 → 64 → 10), both with dynamic batching. CPU
time of the process a request with 1 and with 32 requests in flight, the client's share included (making the request,
about 3 µs). Answers are checked against numpy.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import uvloop
from onnx import TensorProto, helper, numpy_helper

from trine.server.repository import Repository, RepositorySettings
from trine.server.request import InferRequest, InferResponse
from trine.server.tensors import Tensor

WIDTHS = (16, 64, 64, 10)


def write_models(root: Path) -> list[Any]:
    """The two models; returns the perceptron's weights."""
    (root / "identity" / "1").mkdir(parents=True)
    (root / "identity" / "config.pbtxt").write_text(
        """backend: "identity" max_batch_size: 64 dynamic_batching { }
        input [{ name: "x" data_type: TYPE_FP32 dims: [16] }] output [{ name: "y" data_type: TYPE_FP32 dims: [16] }]"""
    )
    (root / "perceptron" / "1").mkdir(parents=True)
    (root / "perceptron" / "config.pbtxt").write_text("max_batch_size: 64 dynamic_batching { }")
    generator = np.random.default_rng(0)
    weights = [generator.standard_normal(shape).astype(np.float32) for shape in itertools.pairwise(WIDTHS)]
    nodes, last = [], "x"
    for index in range(len(weights)):
        target = "y" if index == len(weights) - 1 else f"h{index}"
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [target]))
        last = target
        if target != "y":
            nodes.append(helper.make_node("Relu", [target], [f"r{index}"]))
            last = f"r{index}"
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTHS[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", WIDTHS[-1]])],
        [numpy_helper.from_array(weight, f"w{index}") for index, weight in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(root / "perceptron" / "1" / "model.onnx"))
    return weights


def expected(model: str, weights: list[Any], row: Any) -> Any:
    if model == "identity":
        return row
    for weight in weights[:-1]:
        row = np.maximum(row @ weight, 0)
    return row @ weights[-1]


async def measure(repository: Repository, name: str, in_flight: int, requests: int, row: Any) -> tuple[float, Any]:
    """CPU µs a request, and the last answer."""
    loop = asyncio.get_running_loop()
    raw = row.tobytes()
    ended: asyncio.Future[InferResponse] = loop.create_future()
    sent = answered = 0

    def respond(response: InferResponse) -> None:
        nonlocal answered
        answered += 1
        if answered == requests or response.error is not None:
            if not ended.done():
                ended.set_result(response)
        elif sent < requests:
            loop.call_soon(send)

    def send() -> None:
        nonlocal sent
        sent += 1
        tensor = Tensor("x", "FP32", (1, 16), None, raw)
        repository.model(name).submit(InferRequest(name, {"x": tensor}, respond))

    began = time.process_time()
    for _ in range(in_flight):
        send()
    response = await ended
    if response.error is not None:
        raise response.error
    return (time.process_time() - began) / requests * 1e6, response.outputs[0].array


async def run(requests: int) -> list[dict[str, Any]]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        weights = write_models(Path(folder))
        repository = Repository(RepositorySettings((folder,)))
        await repository.start()
        row = np.random.default_rng(1).standard_normal((1, 16)).astype(np.float32)
        for name in ("identity", "perceptron"):
            for in_flight in (1, 32):
                await measure(repository, name, in_flight, requests // 10, row)
                micros, answer = await measure(repository, name, in_flight, requests, row)
                np.testing.assert_allclose(answer, expected(name, weights, row), rtol=1e-4, atol=1e-4)
                found.append({"model": name, "in_flight": in_flight, "cpu_us": round(micros, 2)})
        await repository.close(1.0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000, help="of each measurement (default: 20000)")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    arguments = parser.parse_args()
    found = uvloop.run(run(arguments.requests))
    if arguments.json:
        print(json.dumps(found))
        return
    for entry in found:
        print(f"{entry['model']:<12} {entry['in_flight']:>3} in flight  {entry['cpu_us']:>7.2f} µs of CPU a request")


if __name__ == "__main__":
    main()
