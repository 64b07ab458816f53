"""Small versions of the networks of bench/plan.py, with an open batch dimension."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

_FILE = Path(__file__).resolve().parents[2] / "bench" / "plan_models.py"


def _full_size() -> Any:
    spec = importlib.util.spec_from_file_location("plan_models", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


full = _full_size()
_TRANSFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def resnet() -> nn.Module:
    blocks = (full.Bottleneck(8, 8, 1), full.Bottleneck(32, 16, 2))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(full.conv_bn(3, 8, 7, 2, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1), *blocks, *head)


def mobilenet() -> nn.Module:
    blocks = (full.Inverted(8, 8, 1, 1), full.Inverted(8, 16, 2, 6), full.Inverted(16, 16, 1, 6))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return nn.Sequential(full.conv_bn(3, 8, 3, 2, act=nn.ReLU6()), *blocks, *head)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


def image(batch: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(batch, 3, 32, 32),)


def tokens(batch: int) -> tuple[torch.Tensor, ...]:
    return torch.randint(0, 100, (batch, 16)), torch.ones(batch, 16, dtype=torch.int64)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[torch.Tensor, ...]]]] = {
    "resnet": (resnet, image),
    "mobilenet": (mobilenet, image),
    "bert": (lambda: full.bert(vocab_size=100, max_position_embeddings=16, **_TRANSFORMER), tokens),
    "vit": (lambda: full.vit(image_size=32, patch_size=8, **_TRANSFORMER), image),
    "unet": (lambda: full.UNet((8, 16)), image),
    "mlp": (mlp, lambda batch: (torch.randn(batch, 20),)),
}


def network(name: str) -> nn.Module:
    """In inference mode, its normalisations with statistics that are not the trivial ones."""
    torch.manual_seed(0)
    made = NETWORKS[name][0]().eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.running_mean, -0.1, 0.1), (module.running_var, 0.8, 1.2)):
                assert tensor is not None
                tensor.uniform_(low, high)
    return made


def arguments(name: str, batch: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(batch)
    return NETWORKS[name][1](batch)


def export(name: str, path: Path) -> None:
    """As ONNX, with inputs input_0, input_1, …, and `output`."""
    given = arguments(name, 2)
    names = [f"input_{index}" for index in range(len(given))]
    open_batch = {key: {0: "batch"} for key in (*names, "output")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network(name),
            given,
            str(path),
            input_names=names,
            output_names=["output"],
            dynamic_axes=open_batch,
            dynamo=False,
            opset_version=17,
        )
