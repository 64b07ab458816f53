"""The inference server's data path: requests/s, latency and the server's CPU time a request, over HTTP and gRPC.

    python bench/serving.py                                       Trine alone
    python bench/serving.py --peer triton --peer-python PYTHON    and real Triton beside it (nvidia-pytriton in PYTHON)

Both servers run at once and are loaded in turns, run by run, so that what else the machine does meets both; each figure
is the median of the runs. HTTP is loaded by wrk, gRPC by grpc.aio (a large part of its rate: weigh the CPU time). The
models: FP32[16] and FP32[150528] (602 KB) identities, and a perceptron 784-512-512-10 with dynamic batching in ONNX
Runtime. Trine's are the back ends `identity` and `onnxruntime`; Triton's package has only the Python back end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil

HERE = Path(__file__).resolve().parent
SHAPES = {"identity16": [16], "identity_img": [150528], "mlp": [1, 784]}
PROTOCOLS = ("http", "grpc")

_IDENTITY = """
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
_ONNX = """
import os
import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy() for request in requests]
        batch = inputs[0] if len(inputs) == 1 else np.concatenate(inputs)
        output = self.session.run(None, {"INPUT0": batch})[0]
        ends = np.cumsum([len(rows) for rows in inputs])[:-1]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", rows)]) for rows in np.split(output, ends)
        ]
"""


def write_perceptron(path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    sizes = [784, 512, 512, 10]
    nodes, weights, value = [], [], "INPUT0"
    for index, (rows, columns) in enumerate(pairwise(sizes)):
        matrix = (random.standard_normal((rows, columns)) / rows**0.5).astype(np.float32)
        weights += [numpy_helper.from_array(matrix, f"w{index}")]
        last = index == len(sizes) - 2
        nodes.append(helper.make_node("MatMul", [value, f"w{index}"], ["OUTPUT0" if last else f"h{index}"]))
        if not last:
            nodes.append(helper.make_node("Relu", [f"h{index}"], [f"r{index}"]))
            value = f"r{index}"
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info("INPUT0", TensorProto.FLOAT, ["b", 784])],
        [helper.make_tensor_value_info("OUTPUT0", TensorProto.FLOAT, ["b", 10])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(path))


def write_models(root: Path, *, python: bool) -> None:
    """The three models; python: for the Python back end."""
    for name, shape in SHAPES.items():
        folder = root / name
        (folder / "1").mkdir(parents=True)
        batched = name == "mlp"
        backend = "python" if python else "onnxruntime" if batched else "identity"
        outputs = [10] if batched else shape
        lines = [
            f'name: "{name}"',
            f'backend: "{backend}"',
            f"max_batch_size: {32 if batched else 0}",
            f'input [ {{ name: "INPUT0" data_type: TYPE_FP32 dims: {shape[batched:]} }} ]',
            f'output [ {{ name: "OUTPUT0" data_type: TYPE_FP32 dims: {outputs} }} ]',
            "instance_group [ { count: 1 kind: KIND_CPU } ]",
        ]
        if batched:
            lines.append("dynamic_batching { }")
            write_perceptron(folder / "1" / "model.onnx")
        if python:
            (folder / "1" / "model.py").write_text(_ONNX if batched else _IDENTITY)
        (folder / "config.pbtxt").write_text("\n".join(lines))


@dataclass
class Server:
    """A running server."""

    name: str
    process: subprocess.Popen[bytes]
    http: int
    grpc: int

    def cpu_seconds(self) -> float:
        main = psutil.Process(self.process.pid)
        total = 0.0
        for process in (main, *main.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def wait(self) -> None:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.http}/v2/health/ready", timeout=2)
                return
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name} ended with {self.process.returncode}")
            time.sleep(0.5)
        raise SystemExit(f"{self.name} is not ready")


@contextlib.contextmanager
def running(name: str, command: list[str], http: int, grpc: int, log: Path) -> Iterator[Server]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=HERE.parent)
    server = Server(name, process, http, grpc)
    try:
        server.wait()
        yield server
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(40)
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()


def http_request(model: str) -> tuple[bytes, dict[str, str], bytes]:
    """Body, headers, and the tensor's bytes."""
    shape = SHAPES[model]
    data = np.random.default_rng(0).standard_normal(shape).astype(np.float32).tobytes()
    inputs = [{"name": "INPUT0", "shape": shape, "datatype": "FP32", "parameters": {"binary_data_size": len(data)}}]
    outputs = [{"name": "OUTPUT0", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    return head + data, headers, data


_SCRIPT = """
local file = io.open("{body}", "rb")
wrk.method = "POST"
wrk.body = file:read("*a")
file:close()
{headers}
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("RESULT %d %d %f %f %d\\n", summary.requests, summary.duration, latency:percentile(50),
    latency:percentile(99), e.status + e.read + e.connect + e.timeout))
end
"""


def load_http(server: Server, model: str, connections: int, seconds: float) -> dict[str, Any]:
    body, headers, data = http_request(model)
    url = f"http://127.0.0.1:{server.http}/v2/models/{model}/infer"
    answer = urllib.request.urlopen(urllib.request.Request(url, body, headers)).read()
    assert not model.startswith("identity") or answer.endswith(data)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "body").write_bytes(body)
        lines = "\n".join(f'wrk.headers["{key}"] = "{value}"' for key, value in headers.items())
        (Path(folder) / "load.lua").write_text(_SCRIPT.format(body=f"{folder}/body", headers=lines))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "-s", f"{folder}/load.lua", url]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"RESULT (\d+) (\d+) ([\d.]+) ([\d.]+) (\d+)", output)
    assert found is not None, output
    count, microseconds, p50, p99, errors = map(float, found.groups())
    assert errors == 0, output
    return {"requests": count, "rate": count / microseconds * 1e6, "p50": p50 / 1e3, "p99": p99 / 1e3}


def load_grpc(server: Server, model: str, connections: int, seconds: float) -> dict[str, Any]:
    shape = "x".join(map(str, SHAPES[model]))
    script = str(HERE / "peers" / "grpc_load.py")
    command = [sys.executable, script, f"127.0.0.1:{server.grpc}", model, shape, str(connections), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


LOADS = {"http": load_http, "grpc": load_grpc}


def measure(servers: list[Server], protocol: str, model: str, connections: int, args: argparse.Namespace) -> Any:
    """Medians by server."""
    runs: dict[str, list[dict[str, Any]]] = {server.name: [] for server in servers}
    for server in servers:
        LOADS[protocol](server, model, connections, 1.0)  # warm up
    for _ in range(args.runs):
        for server in servers:
            before = server.cpu_seconds()
            result = LOADS[protocol](server, model, connections, args.seconds)
            result["cpu_ms"] = (server.cpu_seconds() - before) / result["requests"] * 1e3
            runs[server.name].append(result)
    return {
        name: {key: round(statistics.median(run[key] for run in found), 4) for key in ("rate", "p50", "p99", "cpu_ms")}
        for name, found in runs.items()
    }


def report(rows: list[dict[str, Any]], peer: str | None) -> None:
    titles = ["load", "connections", "requests/s", "p50 ms", "p99 ms", "CPU ms"]
    if peer:
        titles += [f"{peer} requests/s", "p50", "p99", "CPU", "rate ×", "CPU ×"]
    print(" | ".join(titles))
    for row in rows:
        own = row["trine"]
        cells = [f"{row['protocol']} {row['model']}", row["connections"], f"{own['rate']:.0f}"]
        cells += [f"{own[key]:.3f}" for key in ("p50", "p99", "cpu_ms")]
        if peer:
            other = row[peer]
            cells += [f"{other['rate']:.0f}", *(f"{other[key]:.3f}" for key in ("p50", "p99", "cpu_ms"))]
            cells += [f"{own['rate'] / other['rate']:.2f}", f"{own['cpu_ms'] / other['cpu_ms']:.2f}"]
        print(" | ".join(map(str, cells)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=("triton",))
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has nvidia-pytriton")
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--protocols", default=",".join(PROTOCOLS))
    parser.add_argument("--connections", default="1,8,32")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--port", type=int, default=18000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        root = Path(folder)
        write_models(root / "trine", python=False)
        port = args.port
        command = [sys.executable, "-m", "trine.cli.main", "serve", "--model-repository", str(root / "trine")]
        own = running("trine", [*command, "--port", str(port)], port, port + 1, root / "trine.log")
        servers = [stack.enter_context(own)]
        if args.peer:
            write_models(root / "triton", python=True)
            ports = [f"--{name}-port={port + 10 + index}" for index, name in enumerate(("http", "grpc", "metrics"))]
            launcher = str(HERE / "peers" / "triton_server.py")
            command = [args.peer_python, launcher, str(root / "triton"), *ports]
            servers.append(stack.enter_context(running("triton", command, port + 10, port + 11, root / "triton.log")))
        rows = []
        for protocol in args.protocols.split(","):
            for model in args.models.split(","):
                for connections in map(int, args.connections.split(",")):
                    figures = measure(servers, protocol, model, connections, args)
                    rows.append({"protocol": protocol, "model": model, "connections": connections, **figures})
                    report(rows[-1:], args.peer) if len(rows) > 1 else report(rows, args.peer)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
