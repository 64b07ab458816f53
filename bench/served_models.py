"""Six networks as plan, ONNX model and TorchScript in one repository, asked by `tritonclient` over HTTP and gRPC.

    python bench/served_models.py --folder /tmp/served        # about 4 minutes the first time, 9 GB there

Models of bench/plan_models.py, with an open batch dimension. Every answer must be that of the module in torch, whatever
the file, the protocol and the batch; times are of one client that waits for each answer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import serving
import torch
import tritonclient.grpc as grpc
import tritonclient.http as http
from plan_models import MODELS, make

KINDS = {"plan": "model.plan", "onnx": "model.onnx", "script": "model.pt"}
TYPES = {torch.float32: ("FP32", "TYPE_FP32"), torch.int64: ("INT64", "TYPE_INT64")}
LIMIT = 1e-4
"""Largest error, relative to the answer's norm."""


def write(root: Path, name: str, kind: str) -> None:
    """A version directory's file. Plans and ONNX models say themselves what they take."""
    file = root / f"{name}_{kind}" / "1" / KINDS[kind]
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    inputs = MODELS[name][1](2)
    names = [f"input_{index}" for index in range(len(inputs))]
    if kind == "onnx":
        opened = {key: {0: "batch"} for key in (*names, "output")}
        torch.onnx.export(make(name), inputs, str(file), input_names=names, output_names=["output"],
                          dynamic_axes=opened, dynamo=False, opset_version=17)  # fmt: skip
    elif kind == "plan":
        source = root / f"{name}_onnx" / "1" / "model.onnx"
        best = ",".join(f"{key}:{'x'.join(map(str, (4, *x.shape[1:])))}" for key, x in zip(names, inputs, strict=True))
        command = [sys.executable, "-m", "trine.cli.main", "build", str(source), "-o", str(file), "--opt", best]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    else:
        with torch.no_grad():
            torch.jit.save(torch.jit.trace(make(name), inputs), str(file))
            rank = make(name)(*inputs).dim()
        fields = [(f"INPUT__{i}", TYPES[x.dtype][1], x.shape[1:]) for i, x in enumerate(inputs)]
        given = ", ".join(f'{{ name: "{k}" data_type: {t} dims: {list(d)} }}' for k, t, d in fields)
        result = f'{{ name: "OUTPUT__0" data_type: TYPE_FP32 dims: {[-1] * (rank - 1)} }}'
        config = f'backend: "pytorch" max_batch_size: 4\ninput [ {given} ]\noutput [ {result} ]\n'
        (file.parent.parent / "config.pbtxt").write_text(config)


def ask(client: Any, library: Any, model: str, arrays: list[Any]) -> np.ndarray[Any, Any]:
    script = model.endswith("_script")
    given = []
    for index, x in enumerate(arrays):
        tensor = library.InferInput(f"{'INPUT__' if script else 'input_'}{index}", list(x.shape), TYPES[x.dtype][0])
        tensor.set_data_from_numpy(x.numpy())
        given.append(tensor)
    answer: np.ndarray[Any, Any] = client.infer(model, given).as_numpy("OUTPUT__0" if script else "output")
    return answer


def check(name: str, clients: dict[str, tuple[Any, Any]]) -> bool:
    """One network's line: milliseconds by file and protocol, and the largest error."""
    module, worst, times = make(name), 0.0, {}
    for batch in (1, 3, 4):
        torch.manual_seed(batch)
        arrays = list(MODELS[name][1](batch))
        with torch.no_grad():
            wanted = module(*arrays).numpy()
        for kind in KINDS:
            for protocol, (client, library) in clients.items():
                started = time.perf_counter()
                answer = ask(client, library, f"{name}_{kind}", arrays)
                times[f"{kind} {protocol} {batch}"] = (time.perf_counter() - started) * 1e3
                assert answer.shape == wanted.shape, (name, kind, answer.shape, wanted.shape)
                worst = max(worst, float(np.linalg.norm(answer - wanted) / np.linalg.norm(wanted)))
    took = "  ".join(f"{key} {value:.0f}" for key, value in times.items())
    print(f"{name:13}{'same' if worst <= LIMIT else 'DIFFERENT'} ({worst:.1e})  ms: {took}", flush=True)
    return worst <= LIMIT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the repository, kept for the next call")
    parser.add_argument("--model", type=lambda text: text.split(","), default=list(MODELS), help=",".join(MODELS))
    args = parser.parse_args()
    for name in args.model:
        for kind in ("onnx", "plan", "script"):
            write(args.folder, name, kind)
    command = [sys.executable, "-m", "trine.cli.main", "serve", "--model-repository", str(args.folder),
               "--http-port", "18400", "--grpc-port", "18401"]  # fmt: skip
    with serving.running("trine", command, 18400, 18401, args.folder / "server.log"):
        clients = {
            "http": (http.InferenceServerClient("127.0.0.1:18400"), http),
            "grpc": (grpc.InferenceServerClient("127.0.0.1:18401"), grpc),
        }
        print(f"loaded: {sum(model['state'] == 'READY' for model in clients['http'][0].get_model_repository_index())}")
        right = [check(name, clients) for name in args.model]
    return 0 if all(right) else 1


if __name__ == "__main__":
    raise SystemExit(main())
