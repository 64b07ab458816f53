"""float8 checkpoints of mixtures of experts load; what is wrong with one is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.llm.models.checkpoints import MOE, Case, build
from tests.llm.test_fp8 import COMPRESSED, Tensors, by_block, by_channel, by_tensor, logits, store
from trine.core.errors import ModelLoadError
from trine.kernels.fp8 import Fp8Weight, pack_fp8
from trine.llm.loading import load_model

Change = Callable[[str, torch.Tensor], Tensors]


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    build(Case("", "Qwen3Moe", {**MOE, "moe_intermediate_size": 144}), tmp_path / "model")
    return tmp_path / "model"


def but_the_router(change: Change) -> Change:
    return lambda name, weight: {name + "weight": weight} if name.endswith(".gate.") else change(name, weight)


@pytest.mark.parametrize(
    ("config", "change"),
    [
        ({"quant_method": "fp8", "activation_scheme": "static"}, by_tensor),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, by_block),
        (COMPRESSED, by_channel),
    ],
    ids=["tensor", "block", "compressed-tensors"],
)
def test_stored_float8(experts: Path, config: dict[str, Any], change: Change) -> None:
    expected = logits(experts)
    store(experts, config, but_the_router(change))
    model, _ = load_model(experts, dtype=torch.float32, device=torch.device("cpu"))
    mixture = model.layers[1].mlp
    assert all(isinstance(weight, Fp8Weight) for weight in (*mixture.experts.gate_up, *mixture.experts.down))
    errors = (logits(experts) - expected).norm(dim=1) / expected.norm(dim=1)
    assert 0 < float(errors.median()) < 0.2  # where rounding changes the choice of experts, logits differ more


def test_an_expert_without_its_scale_is_named(experts: Path) -> None:
    def without(name: str, weight: torch.Tensor) -> Tensors:
        return {name + "weight": pack_fp8(weight).values} if ".experts.5.up_" in name else by_channel(name, weight)

    store(experts, COMPRESSED, but_the_router(without))
    with pytest.raises(ModelLoadError, match=r"expert 5\.up .*weight_scale"):
        logits(experts)
