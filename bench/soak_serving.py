"""Many open connections with mixed traffic and clients that hang up: nothing is lost, memory stays flat.

    python bench/soak_serving.py --connections 2000 --minutes 10

Connections send JSON and binary requests, streams and raw bytes over HTTP; some hang up in the middle of a request or
of its answer; gRPC calls run beside them, some called off. At the end the server's own counts must add up: requests
that models accepted = answered + failed or cancelled, none pending; and its memory after the first fifth of the time
is compared with that at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import uvloop
from tritonclient.grpc import service_pb2 as pb

_REPEAT = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            count = int(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy().reshape(-1)[0])
            sender = request.get_response_sender()
            for index in range(count):
                if request.is_cancelled():
                    break
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.array([index], np.int32))]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
_DELAY = 'parameters { key: "execute_delay_ms" value { string_value: "5" } }\n'


def write_models(root: Path) -> None:
    for name, dims, extra in (
        ("identity", "[ -1 ]", "max_batch_size: 0\n"),
        ("slow", "[ 4 ]", f"max_batch_size: 64\ndynamic_batching {{ }}\n{_DELAY}"),
    ):
        (root / name / "1").mkdir(parents=True)
        tensors = "".join(
            f'{kind} [ {{ name: "{tensor}" data_type: TYPE_FP32 dims: {dims} }} ]\n'
            for kind, tensor in (("input", "INPUT0"), ("output", "OUTPUT0"))
        )
        (root / name / "config.pbtxt").write_text(f'backend: "identity"\n{extra}{tensors}')
    (root / "repeat" / "1").mkdir(parents=True)
    (root / "repeat" / "1" / "model.py").write_text(_REPEAT)
    (root / "repeat" / "config.pbtxt").write_text(
        'backend: "python"\nmodel_transaction_policy { decoupled: true }\n'
        'input [ { name: "IN" data_type: TYPE_INT32 dims: [ 1 ] } ]\n'
        'output [ { name: "OUT" data_type: TYPE_INT32 dims: [ 1 ] } ]\n'
    )


class Tally:
    """What the clients saw."""

    def __init__(self) -> None:
        self.answered = 0
        self.refused = 0
        self.hung_up = 0
        self.wrong: list[str] = []


def http_body(path: str, document: Any, tail: bytes = b"") -> bytes:
    head = json.dumps(document).encode()
    length = b"Inference-Header-Content-Length: %d\r\n" % len(head) if tail else b""
    size = len(head) + len(tail)
    return b"POST %b HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n%b%b" % (
        path.encode(),
        length,
        size,
        head,
        tail,
    )


def requests() -> list[tuple[bytes, bytes]]:
    """Requests, and what their answers hold."""
    values = np.arange(4, dtype=np.float32)
    batch = {"name": "INPUT0", "shape": [1, 4], "datatype": "FP32", "data": values.tolist()}
    flat = {"name": "INPUT0", "shape": [4], "datatype": "FP32", "data": values.tolist()}
    large = np.random.default_rng(0).standard_normal(20_000).astype(np.float32).tobytes()
    binary = {"name": "INPUT0", "shape": [20_000], "datatype": "FP32", "parameters": {"binary_data_size": len(large)}}
    wanted = {"name": "OUTPUT0", "parameters": {"binary_data": True}}
    return [
        (http_body("/v2/models/identity/infer", {"inputs": [flat]}), b'"data":[0.0,1.0,2.0,3.0]'),
        (http_body("/v2/models/identity/infer", {"inputs": [flat]}), b'"data":[0.0,1.0,2.0,3.0]'),
        (http_body("/v2/models/slow/infer", {"inputs": [batch]}), b'"data":[0.0,1.0,2.0,3.0]'),
        (http_body("/v2/models/identity/infer", {"inputs": [binary], "outputs": [wanted]}, large), large[:64]),
        (http_body("/v2/models/repeat/generate_stream", {"IN": 5}), b'data: {"OUT":4'),
        (http_body("/v2/models/identity/infer", {"inputs": []}), b'"error"'),
    ]


async def read_answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    if b"chunked" in head:
        body = b""
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
        return body
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return await reader.readexactly(int(length.partition(b":")[2]))


async def http_client(port: int, seed: int, stop: float, pause: float, tally: Tally) -> None:
    chance = random.Random(seed)
    kinds = requests()
    reader: asyncio.StreamReader | None = None
    writer: asyncio.StreamWriter | None = None
    while time.monotonic() < stop:
        await asyncio.sleep(chance.random() * 2 * pause)
        if writer is None or reader is None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        data, expected = chance.choice(kinds)
        fate = chance.random()
        try:
            if fate < 0.05:  # hangs up in the middle of the request
                writer.write(data[: chance.randrange(1, len(data))])
            else:
                writer.write(data)
            if fate < 0.12:  # … or of the answer
                await asyncio.sleep(chance.random() * 0.01)
                tally.hung_up += 1
                writer.close()
                reader = writer = None
                continue
            answer = await asyncio.wait_for(read_answer(reader), 60)
            tally.answered += 1
            if expected not in answer:
                tally.wrong.append(f"{expected[:40]!r} is not in {answer[:200]!r}")
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            tally.wrong.append(f"{type(error).__name__}: {error}")
            reader = writer = None
    if writer is not None:
        writer.close()


async def grpc_client(port: int, seed: int, stop: float, pause: float, tally: Tally) -> None:
    chance = random.Random(seed)
    message = pb.ModelInferRequest(model_name="slow")
    message.inputs.add(name="INPUT0", datatype="FP32", shape=[1, 4])
    message.raw_input_contents.append(bytes(16))
    body = message.SerializeToString()
    async with grpc.aio.insecure_channel(
        f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        while time.monotonic() < stop:
            await asyncio.sleep(chance.random() * 2 * pause)
            running = call(body, timeout=60)
            if chance.random() < 0.1:
                await asyncio.sleep(chance.random() * 0.01)
                running.cancel()
                tally.hung_up += 1
                continue
            try:
                await running
                tally.answered += 1
            except grpc.aio.AioRpcError as error:
                tally.wrong.append(f"{error.code()}: {error.details()}")


def statistics(port: int) -> dict[str, Any]:
    url = f"http://127.0.0.1:{port}/v2/models/stats"
    found: dict[str, Any] = json.loads(urllib.request.urlopen(url, timeout=20).read())
    return {stats["name"]: stats["inference_stats"] for stats in found["model_stats"]}


def pending(port: int) -> int:
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20).read().decode()
    lines = [line for line in text.splitlines() if line.startswith("nv_inference_pending_request_count{")]
    return sum(int(float(line.rpartition(" ")[2])) for line in lines)


async def soak(args: argparse.Namespace, process: psutil.Process, port: int) -> dict[str, Any]:
    tally = Tally()
    stop = time.monotonic() + args.minutes * 60
    pause = args.connections / args.rate
    calls = max(1, args.connections // 50)
    clients = [http_client(port, seed, stop, pause, tally) for seed in range(args.connections - calls)]
    clients += [grpc_client(port + 1, seed, stop, pause, tally) for seed in range(calls)]
    running = asyncio.gather(*clients)
    await asyncio.sleep(args.minutes * 60 / 5)
    early = process.memory_info().rss
    await asyncio.sleep(args.minutes * 60 * 0.75)
    late = process.memory_info().rss
    await running
    await asyncio.sleep(2)
    counts = statistics(port)
    return {
        "answered": tally.answered,
        "hung_up": tally.hung_up,
        "wrong": len(tally.wrong),
        "first_wrong": tally.wrong[:3],
        "server_success": sum(stats["success"]["count"] for stats in counts.values()),
        "server_fail": sum(stats["fail"]["count"] for stats in counts.values()),
        "pending": pending(port + 2),
        "memory_early_mib": round(early / 2**20, 1),
        "memory_late_mib": round(late / 2**20, 1),
        "open_files": process.num_fds(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=1000.0, help="requests a second, of all connections")
    parser.add_argument("--minutes", type=float, default=10.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        write_models(Path(folder))
        command = [sys.executable, "-m", "trine.cli.main", "serve", "--model-repository", folder, "--port", str(port)]
        server = subprocess.Popen(command)
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=2)
                    break
                except OSError:
                    time.sleep(0.25)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                result = runner.run(soak(args, psutil.Process(server.pid), port))
        finally:
            server.terminate()
            server.wait(60)
    print(json.dumps(result, indent=1))
    flat = result["memory_late_mib"] < result["memory_early_mib"] * 1.1 + 16
    sys.exit(0 if not result["wrong"] and not result["pending"] and flat else 1)


if __name__ == "__main__":
    main()
