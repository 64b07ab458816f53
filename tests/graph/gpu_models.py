"""Small networks with what the GPU side knows: attention with a mask, norms, images, transposed convolutions."""

from __future__ import annotations

import io
import warnings

import torch
from torch import nn

from trine.graph.importer import import_model
from trine.graph.ir import Graph
from trine.graph.passes import optimise


class Layer(nn.Module):
    """A transformer's layer, its norms after the sums or before the products."""

    def __init__(self, width: int, heads: int, first: bool) -> None:
        super().__init__()
        self.heads, self.first = heads, first
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def attend(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        scores = q @ k.transpose(-1, -2) * 0.25 + mask
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.first:
            x = x + self.attend(self.norms[0](x), mask)
            return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        x = self.norms[0](x + self.attend(x, mask))
        return self.norms[1](x + self.down(nn.functional.gelu(self.up(x))))


class Encoder(nn.Module):
    """Tokens and their mask to states; the mask is a row that is widened, as exporters do."""

    def __init__(self, first: bool, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, width), nn.Parameter(torch.randn(1, 6, width))
        self.layers = nn.ModuleList([Layer(width, heads, first) for _ in range(2)])
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        wide = torch.ones(1, 1, 6, 6, dtype=torch.bool) & present.bool()[:, None, None, :]
        mask = torch.where(wide, 0.0, -1e4)
        x = self.tokens(ids) + self.places
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


class Images(nn.Module):
    """Convolutions of every kind that has candidates of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, 2)
        self.stem = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.depth = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU6())
        self.point = nn.Conv2d(16, 16, 1)
        self.up, self.wide = nn.ConvTranspose2d(16, 8, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.last = nn.Linear(40, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.patch(x)
        x = self.stem(patches)
        x = torch.relu(x + self.point(self.depth(x)))
        small = nn.functional.max_pool2d(x, 3, 2, 1)
        joined = torch.cat([self.wide(x), patches], 1)
        means = [image.mean((2, 3)) for image in (small, self.up(x), joined)]
        return self.last(torch.cat(means, 1))


def graph_of(module: nn.Module, *inputs: torch.Tensor, open_batch: bool = False) -> Graph:
    """The module as an optimised graph; inputs are called x0, x1, …"""
    names = [f"x{index}" for index in range(len(inputs))]
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), inputs, buffer, input_names=names, dynamo=False, opset_version=17,
            dynamic_axes={name: {0: "batch"} for name in names} if open_batch else None,
        )  # fmt: skip
    graph = import_model(buffer.getvalue())
    optimise(graph)
    return graph


def encoder_inputs(batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    present = torch.ones(batch, 6, dtype=torch.int64)
    present[0, 4:] = 0
    return torch.randint(0, 50, (batch, 6), generator=generator), present
