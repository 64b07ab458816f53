"""Losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trine.graph.operators.registry import operator


@operator("NegativeLogLikelihoodLoss")
def negative_log_likelihood_loss(
    x: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int | None = None, reduction: str = "mean"
) -> Tensor:
    """x [N, C, …] are log probabilities, target [N, …] classes. The mean is over the weights."""
    classes = target.long()
    ignored = torch.zeros_like(classes, dtype=torch.bool) if ignore_index is None else classes == ignore_index
    held = torch.where(ignored, torch.zeros_like(classes), classes)
    picked = torch.gather(x, 1, held.unsqueeze(1)).squeeze(1)
    weights = torch.ones_like(picked) if weight is None else weight[held]
    weights = torch.where(ignored, torch.zeros((), dtype=weights.dtype), weights)
    loss = -picked * weights
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / weights.sum()


@operator("SoftmaxCrossEntropyLoss")
def softmax_cross_entropy_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
    _outputs: int = 1,
) -> Any:
    """Second output: the log probabilities."""
    log = torch.log_softmax(x, 1)
    loss = negative_log_likelihood_loss(log, target, weight, ignore_index=ignore_index, reduction=reduction)
    return (loss, log) if _outputs > 1 else loss
