"""Dynamic batching: clients in a closed loop on a model that takes 1 ms for a batch, beside the most there can be.

    python bench/batching.py                                       64 clients, batches of 8, HTTP and gRPC
    python bench/batching.py --peer triton --peer-python PYTHON    and real Triton's Python back end beside it

The most there can be is batch / time of a batch: a sleep of 1 ms, timed alone in this process just before and just
after the loads. Models: the back end `identity` with a delay, and a Python model that sleeps. Answers are checked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import serving

_PYTHON = """
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        time.sleep(0.001)
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor("OUTPUT0", pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy())]
            )
            for request in requests
        ]
"""
_CONFIG = """
backend: "{backend}"
max_batch_size: {batch}
input [ {{ name: "INPUT0" data_type: TYPE_FP32 dims: [ 16 ] }} ]
output [ {{ name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 16 ] }} ]
instance_group [ {{ count: {instances} kind: KIND_CPU }} ]
dynamic_batching {{ }}
{extra}
"""
_DELAY = 'parameters { key: "execute_delay_ms" value { string_value: "1" } }'
MODELS = ("identity_delayed", "identity_python")


def write_models(root: Path, arguments: argparse.Namespace, *, python: bool) -> None:
    """Both models; python: both with the Python back end."""
    for name in MODELS:
        folder = root / name / "1"
        folder.mkdir(parents=True)
        backend = "python" if python or name == "identity_python" else "identity"
        if backend == "python":
            (folder / "model.py").write_text(_PYTHON)
        text = _CONFIG.format(
            backend=backend,
            batch=arguments.batch,
            instances=arguments.instances,
            extra=_DELAY if backend == "identity" else "",
        )
        (folder.parent / "config.pbtxt").write_text(text)


def seconds_of_a_sleep(count: int = 500) -> float:
    took = []
    for _ in range(count):
        began = time.perf_counter()
        time.sleep(0.001)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=("triton",))
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has nvidia-pytriton")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--instances", type=int, default=1)
    parser.add_argument("--protocols", default=",".join(serving.PROTOCOLS))
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--port", type=int, default=18300)
    arguments = parser.parse_args()
    serving.SHAPES.update({name: [1, 16] for name in MODELS})
    rows, sleeps = [], [seconds_of_a_sleep()]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        root, port = Path(folder), arguments.port
        write_models(root / "trine", arguments, python=False)
        command = [sys.executable, "-m", "trine.cli.main", "serve", "--model-repository", str(root / "trine")]
        own = serving.running("trine", [*command, "--port", str(port)], port, port + 1, root / "trine.log")
        servers = [stack.enter_context(own)]
        if arguments.peer:
            write_models(root / "triton", arguments, python=True)
            ports = [f"--{name}-port={port + 10 + index}" for index, name in enumerate(("http", "grpc", "metrics"))]
            launcher = str(serving.HERE / "peers" / "triton_server.py")
            command = [arguments.peer_python, launcher, str(root / "triton"), *ports]
            peer = serving.running("triton", command, port + 10, port + 11, root / "triton.log")
            servers.append(stack.enter_context(peer))
        for protocol in arguments.protocols.split(","):
            for model in MODELS:
                found = serving.measure(servers, protocol, model, arguments.clients, arguments)
                rows.append({"protocol": protocol, "model": model, **found})
                print(json.dumps(rows[-1]), flush=True)
        sleeps.append(seconds_of_a_sleep())
    most = arguments.batch * arguments.instances / statistics.mean(sleeps)
    print(f"a sleep of 1 ms takes {statistics.mean(sleeps) * 1e3:.3f} ms: at most {most:.0f} requests/s")
    for row in rows:
        shares = " ".join(f"{name} {row[name]['rate'] / most:.3f}" for name in row if name in ("trine", "triton"))
        print(f"{row['protocol']} {row['model']}: {shares}")


if __name__ == "__main__":
    main()
