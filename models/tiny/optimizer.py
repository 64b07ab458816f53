"""Muon for the matrices of the layers, AdamW for everything else.

Muon (K. Jordan et al., 2024) replaces a matrix's momentum by the nearest orthogonal matrix, found by five
Newton–Schulz steps. Updates are scaled to the root mean square of an AdamW update (J. Liu et al., "Muon is scalable for
LLM training", 2025), so that one learning rate serves both. Matrices of one shape are orthogonalised together.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
UPDATE_RMS = 0.2


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearly orthogonal matrices of the same singular vectors: [N, rows, columns], in bfloat16 on a GPU."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            shapes.setdefault(parameter.shape, []).append(parameter)
        groups = [{"params": group} for group in shapes.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            parameters = group["params"]
            gradients = torch.stack([parameter.grad for parameter in parameters])
            state = self.state[parameters[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradients)
            average = state["momentum"].lerp_(gradients, 1 - group["momentum"])
            update = orthogonalise(gradients.lerp_(average, group["momentum"])).to(gradients.dtype)
            scale = UPDATE_RMS * max(gradients.shape[1:]) ** 0.5
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, list(update.unbind()), alpha=-group["lr"] * scale)


def make_optimizers(model: nn.Module, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon and AdamW over all parameters; the scalars of the norms do not decay."""
    matrices = [parameter for name, parameter in model.named_parameters() if parameter.ndim == 2 and ".layers." in name]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    embeddings = {"params": [parameter for parameter in others if parameter.ndim == 2], "weight_decay": weight_decay}
    norms = {"params": [parameter for parameter in others if parameter.ndim < 2], "weight_decay": 0.0}
    fused = next(model.parameters()).is_cuda
    return [
        Muon(matrices, lr, weight_decay=weight_decay),
        torch.optim.AdamW([embeddings, norms], lr, betas=(0.9, 0.95), eps=1e-10, fused=fused),
    ]
