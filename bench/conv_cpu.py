"""How near the native convolutions come to what this machine can do, layer by layer, beside oneDNN through torch.

    python bench/conv_cpu.py --model resnet50,mobilenet_v2,unet --batch 1,8 --threads 1,2

For each distinct convolution of a model: how often it occurs, and for every kernel that applies the time and its share
of the multiply-add rate measured in the same run (above 100 % for Winograd's, which multiply less). The last line
weights the fastest kernels' times by their counts. Outputs are checked against torch's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from plan_models import MODELS, make  # noqa: E402

from trine.graph.dtypes import DType  # noqa: E402
from trine.graph.ir import Graph, Node, Value, constant  # noqa: E402
from trine.graph.native import RULES, NativeProgram, Packed  # noqa: E402
from trine.graph.native.recorder import Recorder  # noqa: E402
from trine.graph.shapes import infer_shapes  # noqa: E402
from trine.kernels import cpu  # noqa: E402
from trine.kernels.cpu.native import load  # noqa: E402

VARIANTS = ("direct", "winograd2", "winograd4", "depthwise")
KERNELS = ("conv", "winograd2", "winograd4", "depthwise")


@dataclass(frozen=True)
class Layer:
    """A convolution as a model has it: of square images, with a bias and a ReLU after it."""

    channels: int
    filters: int
    size: int
    kernel: int
    stride: int
    pad: int
    group: int

    def __str__(self) -> str:
        kind = f"/{self.group}" if self.group > 1 else ""
        return f"{self.channels}{kind}>{self.filters} {self.size}x{self.size} k{self.kernel}s{self.stride}"

    def operations(self, batch: int) -> int:
        out = (self.size + 2 * self.pad - self.kernel) // self.stride + 1
        return 2 * batch * out**2 * self.filters * self.channels // self.group * self.kernel**2


def layers_of(model: str) -> Counter[Layer]:
    """The model's convolutions, by running it once."""
    found: Counter[Layer] = Counter()

    def look(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, torch.nn.Conv2d)
        kernel, stride, pad = module.kernel_size[0], module.stride[0], int(module.padding[0])
        shape = inputs[0].shape
        found[Layer(shape[1], module.out_channels, shape[2], kernel, stride, pad, module.groups)] += 1

    network = make(model)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(look)
    with torch.inference_mode():
        network(*MODELS[model][1](1))
    return found


def best(run: Callable[[], Any], seconds: float) -> float:
    run()
    least, deadline, count = float("inf"), time.perf_counter() + seconds, 0
    while count < 3 or time.perf_counter() < deadline:
        start = time.perf_counter()
        run()
        least, count = min(least, time.perf_counter() - start), count + 1
    return least


def peak(threads: int) -> float:
    """Operations a second of multiply-adds out of registers."""
    native, status = load()
    assert native is not None, status
    tasks = 8 * threads
    operations = tasks * native.trine_probe_fma(tasks, 20_000)
    return float(operations / best(lambda: native.trine_probe_fma(tasks, 20_000), 0.05))


class Case:
    """One layer, its operands, and ways to compute it."""

    def __init__(self, layer: Layer, batch: int) -> None:
        self.layer = layer
        self.x = torch.randn(batch, layer.channels, layer.size, layer.size)
        shape = (layer.filters, layer.channels // layer.group, layer.kernel, layer.kernel)
        self.weight, self.bias = torch.randn(shape) / (shape[1] * layer.kernel**2) ** 0.5, torch.randn(layer.filters)
        conv2d = torch.nn.functional.conv2d
        self.expected = conv2d(self.x, self.weight, self.bias, layer.stride, layer.pad, groups=layer.group).relu()

    def native(self, variant: str, seconds: float) -> float | None:
        """Seconds of the step alone: what brings images into its order and back is left out."""
        x = Value("x", DType.FLOAT32, tuple(self.x.shape))
        y = Value("y")
        layer = self.layer
        attributes = {"strides": [layer.stride] * 2, "dilations": [1, 1], "pads": [layer.pad] * 4, "group": layer.group}
        inputs = [x, constant("w", self.weight), constant("b", self.bias)]
        graph = Graph("layer", [x], [y], [Node("FusedConv", list(inputs), [y], {**attributes, "activation": "relu"})])
        graph.output_names = ["y"]
        infer_shapes(graph)
        if not Recorder(Packed(graph)).record(graph.nodes[0], RULES["FusedConv"][variant]):
            return None
        program = NativeProgram(graph, Packed(graph), {graph.nodes[0]: variant})
        [got] = program.run(self.x)
        torch.testing.assert_close(got, self.expected, rtol=1e-3, atol=1e-3)
        # A profile begins with memory that was never touched, so many runs each.
        start = time.perf_counter()
        program.run(self.x)
        runs = max(10, int(seconds / 3 / (time.perf_counter() - start)))
        means = [program.profile([self.x], runs) for _ in range(3)]
        return min(sum(step.milliseconds for step in mean if step.kernel in KERNELS) for mean in means) / 1e3

    def onednn(self, seconds: float) -> float:
        layer, x = self.layer, self.x.contiguous(memory_format=torch.channels_last)
        pads, strides, ones = [layer.pad] * 2, [layer.stride] * 2, [1, 1]
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        packed = reorder(self.weight.to_mkldnn(), pads, strides, ones, layer.group, list(x.shape))
        fused = torch.ops.mkldnn._convolution_pointwise.default
        return best(lambda: fused(x, packed, self.bias, pads, strides, ones, layer.group, "relu", [], None), seconds)


def compare(model: str, batch: int, threads: int, seconds: float) -> dict[str, Any]:
    cpu.set_num_threads(threads)
    torch.set_num_threads(threads)
    rate = peak(threads)
    print(f"{model}, batch {batch}, {threads} threads: multiply-adds {rate / 1e9:.0f} GFLOP/s", flush=True)
    rows, ours, theirs = [], 0.0, 0.0
    for layer, count in layers_of(model).items():
        case = Case(layer, batch)
        times = {variant: case.native(variant, seconds) for variant in VARIANTS}
        found = {variant: taken for variant, taken in times.items() if taken is not None}
        if "depthwise" in found:
            del found["direct"]  # sixteen times the work
        with torch.inference_mode():
            found["onednn"] = case.onednn(seconds)
        least = min(taken for name, taken in found.items() if name != "onednn")
        ours, theirs = ours + count * least, theirs + count * found["onednn"]
        figures = "  ".join(
            f"{name} {taken * 1e6:8.1f} µs {layer.operations(batch) / taken / rate:6.1%}"
            for name, taken in found.items()
        )
        print(f"{layer!s:28} x{count}  {figures}", flush=True)
        rows.append({"layer": str(layer), "count": count, "seconds": found})
    print(f"all: {ours * 1e3:.2f} ms, oneDNN {theirs * 1e3:.2f} ms, ratio {theirs / ours:.2f}", flush=True)
    return {"model": model, "batch": batch, "threads": threads, "rate": rate, "layers": rows}


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=lambda text: text.split(","), default=["resnet50", "mobilenet_v2", "unet"])
    parser.add_argument("--batch", type=numbers, default=[1, 8])
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=0.1, help="a layer and kernel")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = [
        compare(model, batch, threads, args.seconds)
        for model in args.model
        for batch in args.batch
        for threads in args.threads
    ]
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
