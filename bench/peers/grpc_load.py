"""Closed-loop load on a server of the v2 protocol over gRPC: prebuilt request bytes, one channel a connection.

    python bench/peers/grpc_load.py HOST:PORT MODEL SHAPE CONNECTIONS SECONDS      for example … identity16 16 8 3

Prints one JSON line: requests, requests/s, percentiles in ms. The first answer is checked, the others are counted.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb

_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def request(model: str, shape: list[int]) -> tuple[bytes, bytes]:
    data = np.random.default_rng(0).standard_normal(shape).astype(np.float32).tobytes()
    message = pb.ModelInferRequest(model_name=model)
    message.inputs.add(name="INPUT0", datatype="FP32", shape=shape)
    message.raw_input_contents.append(data)
    return message.SerializeToString(), data


async def load(url: str, model: str, shape: list[int], connections: int, seconds: float) -> dict[str, Any]:
    body, data = request(model, shape)
    async with grpc.aio.insecure_channel(url, options=_OPTIONS) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        first = pb.ModelInferResponse.FromString(await call(body))
        assert len(first.raw_output_contents) == 1
        assert not model.startswith("identity") or first.raw_output_contents[0] == data
        latencies: list[float] = []

        async def worker(stop: float) -> None:
            while (start := time.perf_counter()) < stop:
                await call(body)
                latencies.append(time.perf_counter() - start)

        start = time.perf_counter()
        await asyncio.gather(*[worker(start + seconds) for _ in range(connections)])
        took = time.perf_counter() - start
    p50, p99 = np.percentile(np.array(latencies) * 1e3, (50, 99))
    return {"requests": len(latencies), "rate": len(latencies) / took, "p50": float(p50), "p99": float(p99)}


if __name__ == "__main__":
    address, name, dims, count, duration = sys.argv[1:]
    sizes = [int(dim) for dim in dims.split("x")]
    print(json.dumps(asyncio.run(load(address, name, sizes, int(count), float(duration)))))
