"""The models of bench/plan.py, with random weights: shapes of well-known networks, exported to ONNX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def conv_bn(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: nn.Module | None = None
) -> nn.Sequential:
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([act] if act is not None else []))


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(inputs, width, 1, act=nn.ReLU()),
            conv_bn(width, width, 3, stride, act=nn.ReLU()),
            conv_bn(width, width * 4, 1),
        )
        same = stride == 1 and inputs == width * 4
        self.skip = nn.Identity() if same else conv_bn(inputs, width * 4, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [conv_bn(3, 64, 7, 2, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(count):
            layers.append(Bottleneck(inputs, width, stride if index == 0 else 1))
            inputs = width * 4
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class Inverted(nn.Module):
    """MobileNetV2's block: widen, depthwise, narrow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        wide = [conv_bn(inputs, hidden, 1, act=nn.ReLU6())] if expand > 1 else []
        self.body = nn.Sequential(
            *wide, conv_bn(hidden, hidden, 3, stride, hidden, nn.ReLU6()), conv_bn(hidden, outputs, 1)
        )
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.same else self.body(x)


def mobilenet_v2() -> nn.Module:
    layers: list[nn.Module] = [conv_bn(3, 32, 3, 2, act=nn.ReLU6())]
    inputs = 32
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expand, outputs, count, stride in table:
        for index in range(count):
            layers.append(Inverted(inputs, outputs, stride if index == 0 else 1, expand))
            inputs = outputs
    layers += [conv_bn(320, 1280, 1, act=nn.ReLU6()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Levels of so many channels, transposed convolutions on the way up."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256)) -> None:
        super().__init__()
        pairs = list(zip((3, *widths[:-1]), widths, strict=True))
        self.down = nn.ModuleList(self.block(a, b) for a, b in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in reversed(pairs[1:]))
        self.merge = nn.ModuleList(self.block(2 * a, a) for a, _ in reversed(pairs[1:]))
        self.head = nn.Conv2d(widths[0], 2, 1)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(conv_bn(inputs, outputs, 3, act=nn.ReLU()), conv_bn(outputs, outputs, 3, act=nn.ReLU()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for index, block in enumerate(self.down):
            x = block(x if index == 0 else nn.functional.max_pool2d(x, 2))
            kept.append(x)
        for up, merge, skip in zip(self.up, self.merge, kept[-2::-1], strict=True):
            x = merge(torch.cat([up(x), skip], 1))
        return self.head(x)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


class Last(nn.Module):
    """A Transformers model that gives its last hidden state alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        state: torch.Tensor = self.model(*inputs, return_dict=False)[0]
        return state


def bert(attention: str = "eager", **shape: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    return Last(BertModel(BertConfig(attn_implementation=attention, **shape), add_pooling_layer=False))


def vit(attention: str = "eager", **shape: int) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return Last(ViTModel(ViTConfig(attn_implementation=attention, **shape), add_pooling_layer=False))


def image(batch: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(batch, 3, 224, 224),)


def tokens(batch: int) -> tuple[torch.Tensor, ...]:
    return torch.randint(0, 30000, (batch, 128)), torch.ones(batch, 128, dtype=torch.int64)


def rows(batch: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(batch, 784),)


MODELS: dict[str, tuple[Callable[..., nn.Module], Callable[[int], tuple[torch.Tensor, ...]]]] = {
    "resnet50": (resnet50, image),
    "mobilenet_v2": (mobilenet_v2, image),
    "bert_base": (bert, tokens),
    "vit_b16": (vit, image),
    "unet": (UNet, image),
    "mlp": (mlp, rows),
}
"""Each model's maker, and its inputs for a batch size."""


def make(name: str, **options: str) -> nn.Module:
    """The model in inference mode, its normalisations with statistics that are not the trivial ones.

    Options are the maker's; weights do not depend on them.
    """
    torch.manual_seed(0)
    model = MODELS[name][0](**options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[operator, union-attr]
            module.running_var.uniform_(0.8, 1.2)  # type: ignore[operator, union-attr]
            module.weight.data.uniform_(0.7, 1.0)
    return model


def export(name: str, batch: int, path: Path) -> dict[str, Any]:
    """Write the model to `path` for this batch size; returns inputs by name."""
    arguments = MODELS[name][1](batch)
    names = [f"input_{index}" for index in range(len(arguments))]
    if not path.exists():
        torch.onnx.export(
            make(name), arguments, str(path), input_names=names, output_names=["output"], dynamo=False, opset_version=17
        )
    return {key: argument.numpy() for key, argument in zip(names, arguments, strict=True)}
