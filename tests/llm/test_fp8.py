"""float8 weights, activations and caches, on the reference kernels: accuracy, and the checkpoints that load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.llm.models.checkpoints import Case, build
from tests.llm.models.harness import PagedModel
from trine import LLM, SamplingParams
from trine.core.errors import ConfigurationError, InsufficientMemoryError, ModelLoadError
from trine.kernels import fp8, reference
from trine.kernels.fp8 import Fp8Weight
from trine.llm import memory
from trine.llm.loading import load_model, weight_bytes
from trine.llm.options import EngineOptions
from trine.llm.quantization import is_fp8_checkpoint

IDS = list(range(5, 40))
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    build(Case("", "Llama", {"num_hidden_layers": 2}), tmp_path / "model")
    return tmp_path / "model"


def logits(directory: Path, **options: Any) -> torch.Tensor:
    model = PagedModel(directory, **options)
    return model.step([(model.new_sequence(), IDS)])[0]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def store(directory: Path, config: dict[str, Any], change: Callable[[str, torch.Tensor], Tensors]) -> None:
    """Make a checkpoint one of float8: `change` gives what its linear layers' weights become."""
    tensors: Tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        linear = tensor.dim() == 2 and "embed" not in name and "lm_head" not in name
        tensors |= change(name.removesuffix("weight"), tensor) if linear else {name: tensor}
    save_file(tensors, directory / "model.safetensors")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))


def by_tensor(name: str, weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax() / fp8.LARGEST
    return {name + "weight": fp8.saturate(weight, scale), name + "weight_scale": scale.reshape(1),
            name + "input_scale": torch.tensor(0.02)}  # fmt: skip


def by_channel(name: str, weight: torch.Tensor) -> Tensors:
    packed = fp8.pack_fp8(weight)
    return {name + "weight": packed.values, name + "weight_scale": packed.scales[:, None].contiguous()}


def by_block(name: str, weight: torch.Tensor) -> Tensors:
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // 128) * 128, -(-columns // 128) * 128)
    padded[:rows, :columns] = weight
    blocks = padded.view(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
    scales = blocks.abs().amax(dim=(1, 3)) / fp8.LARGEST
    values = fp8.saturate(blocks, scales[:, None, :, None]).view(padded.shape)[:rows, :columns].contiguous()
    return {name + "weight": values, name + "weight_scale_inv": scales}


COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}},
}


def test_error_of_layers_with_real_shapes() -> None:
    """What W8A8 loses in one product, of normal numbers with a few large channels as language models have them."""
    generator = torch.Generator().manual_seed(0)
    for inputs, outputs in ((4096, 512), (896, 1152), (14336, 256)):
        weight = torch.randn(outputs, inputs, generator=generator) * 0.02
        x = torch.randn(8, inputs, generator=generator)
        x[:, ::97] *= 20
        assert relative(fp8.linear(x, fp8.pack_fp8(weight)), reference.linear(x, weight)) < 0.045


def test_logits_are_close(llama: Path) -> None:
    expected = logits(llama)
    actual = logits(llama, quantization="fp8")
    assert 0 < relative(actual, expected) < 0.2
    assert 0 < relative(logits(llama, cache_dtype=fp8.DTYPE), expected) < 0.2


def test_weights_are_small(llama: Path) -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "load_format": "dummy"}
    model, _ = load_model(llama, quantization="fp8", **options)
    layer = model.layers[0].mlp.down_proj.weight
    assert isinstance(layer, Fp8Weight)
    assert layer.values.dtype == torch.float8_e4m3fn
    head = model.lm_head.weight
    assert not isinstance(head, Fp8Weight), "the projection to the vocabulary stays as it is"
    assert weight_bytes(model) < weight_bytes(load_model(llama, **options)[0])


@pytest.mark.parametrize(
    ("config", "change"),
    [
        ({"quant_method": "fp8", "activation_scheme": "static"}, by_tensor),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, by_block),
        ({"quant_method": "fbgemm_fp8"}, by_channel),
        (COMPRESSED, by_channel),
    ],
    ids=["tensor", "block", "channel", "compressed-tensors"],
)
def test_stored_float8(llama: Path, config: dict[str, Any], change: Callable[[str, torch.Tensor], Tensors]) -> None:
    expected = logits(llama)
    store(llama, config, change)
    model, _ = load_model(llama, dtype=torch.float32, device=torch.device("cpu"))
    assert isinstance(model.layers[0].self_attn.qkv_proj.weight, Fp8Weight)
    assert 0 < relative(logits(llama), expected) < 0.2


def test_stored_numbers_are_kept_bit_for_bit(llama: Path) -> None:
    plain = load_file(llama / "model.safetensors")
    store(llama, COMPRESSED, by_channel)
    model, _ = load_model(llama, dtype=torch.bfloat16, device=torch.device("cpu"))
    weight = model.layers[1].mlp.gate_up_proj.weight
    halves = [fp8.pack_fp8(plain[f"model.layers.1.mlp.{name}_proj.weight"]) for name in ("gate", "up")]
    assert torch.equal(weight.values.float(), torch.cat([half.values.float() for half in halves]))
    assert torch.equal(weight.scales, torch.cat([half.scales for half in halves]))


def test_what_a_checkpoint_left_plain_stays_plain(llama: Path) -> None:
    def but_down(name: str, weight: torch.Tensor) -> Tensors:
        return {name + "weight": weight} if "down_proj" in name else by_channel(name, weight)

    store(llama, COMPRESSED, but_down)
    model, _ = load_model(llama, dtype=torch.float32, device=torch.device("cpu"))
    assert not isinstance(model.layers[0].mlp.down_proj.weight, Fp8Weight)
    assert isinstance(model.layers[0].mlp.gate_up_proj.weight, Fp8Weight)


def test_scales_of_the_cache_are_read(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.1.self_attn.k_scale"] = torch.tensor([0.5])
    tensors["model.layers.1.self_attn.v_scale"] = torch.tensor(0.25)
    expected = logits(llama)
    save_file(tensors, llama / "model.safetensors")
    model, _ = load_model(llama, dtype=torch.float32, device=torch.device("cpu"))
    assert (model.layers[1].self_attn.k_scale, model.layers[1].self_attn.v_scale) == (0.5, 0.25)
    assert torch.equal(logits(llama), expected), "a cache that is not float8 has no scales"
    assert 0 < relative(logits(llama, cache_dtype=fp8.DTYPE), expected) < 0.2


def test_float8_without_scales_is_an_error(llama: Path) -> None:
    store(llama, COMPRESSED, lambda name, weight: {name + "weight": fp8.pack_fp8(weight).values})
    with pytest.raises(ModelLoadError, match="weight_scale"):
        logits(llama)


def test_scales_of_a_wrong_shape_are_an_error(llama: Path) -> None:
    store(llama, COMPRESSED, lambda name, w: by_channel(name, w) | {name + "weight_scale": torch.ones(3, 5)})
    with pytest.raises(ModelLoadError, match=r"\[3, 5\]"):
        logits(llama)


def test_other_quantised_checkpoints_are_refused() -> None:
    assert not is_fp8_checkpoint({"quant_method": "awq"})
    weights = {"num_bits": 4, "type": "int"}
    assert not is_fp8_checkpoint({"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": weights}}})


def test_options() -> None:
    assert EngineOptions("tiny", quantization="fp8", cache_dtype="fp8").cache_dtype == "fp8"
    with pytest.raises(ConfigurationError, match="cache_dtype"):
        EngineOptions("tiny", cache_dtype="int8")  # type: ignore[arg-type]


def test_memory_that_is_checked_before_loading_is_that_of_rounded_weights(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (llama / "model.safetensors").stat().st_size
    monkeypatch.setattr(memory, "available_bytes", lambda device: size * 3 // 4)
    memory.check_weights_fit(llama, torch.device("cpu"), 0.55)
    with pytest.raises(InsufficientMemoryError, match="--quantization"):
        memory.check_weights_fit(llama, torch.device("cpu"))


def test_generates_through_the_engine() -> None:
    params = SamplingParams(temperature=0, max_tokens=12)
    with LLM("tiny", quantization="fp8", cache_dtype="fp8", cache_bytes=1 << 24, device="cpu") as llm:
        assert "fp8 weights, fp8 cache" in " ".join(llm.info.summary)
        assert llm.generate("Once", params)[0].outputs[0].token_ids
