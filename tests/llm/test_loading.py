"""Loading: what is wrong with a checkpoint is said by name; old and new layouts load; nothing is held twice."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.llm.models.checkpoints import MOE, Case, build
from tests.llm.models.harness import PagedModel
from trine.core.errors import ConfigurationError, ModelLoadError
from trine.llm.config import ModelConfig, resolve_dtype
from trine.llm.layers.rotary import cos_sin_table
from trine.llm.loading import load_model, resolve_model, weight_bytes

CPU = torch.device("cpu")
IDS = list(range(5, 40))

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints to copy and to damage."""
    made = {}
    for name, case in {
        "llama": Case("", "Llama", {"num_hidden_layers": 2}),
        "tied": Case("", "Qwen2", {"tie_word_embeddings": True}),
        "gpt2": Case("", "GPT2"),
        "qwen3_moe": Case("", "Qwen3Moe", {**MOE, "mlp_only_layers": [0]}),
        "mixtral": Case("", "Mixtral", {"num_local_experts": 4}),
    }.items():
        made[name] = tmp_path_factory.mktemp(name)
        build(case, made[name])
    return made


@pytest.fixture
def llama(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return copied(checkpoints["llama"], tmp_path)


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target / "model"))


def rewrite(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change a checkpoint's tensors."""
    tensors = change(load_file(directory / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")


def reconfigure(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def logits(directory: Path, **options: Any) -> torch.Tensor:
    model = PagedModel(directory, **options)
    return model.step([(model.new_sequence(), IDS)])[0]


def load(directory: Path, **options: Any) -> torch.nn.Module:
    return load_model(directory, dtype=torch.float32, device=CPU, **options)[0]


def test_a_missing_tensor_is_named(llama: Path) -> None:
    rewrite(llama, lambda t: {name: t[name] for name in t if name != "model.layers.1.self_attn.k_proj.weight"})
    with pytest.raises(ModelLoadError, match=r"missing.*layers\.1\.self_attn\.k_proj\.weight"):
        load(llama)


def test_a_tensor_too_many_is_named(llama: Path) -> None:
    rewrite(llama, lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    with pytest.raises(ModelLoadError, match=r"no place for: model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(llama)


def test_a_wrong_shape_is_named_with_the_one_expected(llama: Path) -> None:
    rewrite(llama, lambda t: t | {"model.layers.0.mlp.up_proj.weight": torch.zeros(95, 64)})
    with pytest.raises(
        ModelLoadError, match=r"up_proj\.weight in .*model\.safetensors has shape \[95, 64\].*\[96, 64\]"
    ):
        load(llama)


def test_a_config_that_belongs_to_other_weights(llama: Path) -> None:
    reconfigure(llama, vocab_size=200)
    with pytest.raises(ModelLoadError, match=r"embed_tokens\.weight|lm_head\.weight"):
        load(llama)


def test_a_missing_head_is_an_error_unless_tied(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tied = copied(checkpoints["tied"], tmp_path)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    load(tied)
    reconfigure(tied, tie_word_embeddings=False)
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight"):
        load(tied)


def test_a_saved_copy_of_a_tied_head_is_ignored(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tied = copied(checkpoints["tied"], tmp_path)
    before = logits(tied)
    rewrite(tied, lambda t: t | {"lm_head.weight": torch.zeros_like(t["model.embed_tokens.weight"])})
    assert torch.equal(logits(tied), before)


def test_names_without_prefix_and_old_buffers(llama: Path) -> None:
    before = logits(llama)
    rewrite(llama, lambda t: {name.removeprefix("model."): tensor for name, tensor in t.items()})
    rewrite(llama, lambda t: t | {"layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    assert torch.equal(logits(llama), before)


def test_gpt2_as_openai_published_it(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """No "transformer." prefix, causal masks among the weights."""
    gpt2 = copied(checkpoints["gpt2"], tmp_path)
    before = logits(gpt2)
    rewrite(gpt2, lambda t: {name.removeprefix("transformer."): tensor for name, tensor in t.items()})
    rewrite(
        gpt2, lambda t: t | {"h.0.attn.bias": torch.ones(1, 1, 256, 256), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    )
    assert torch.equal(logits(gpt2), before)


@pytest.mark.parametrize(
    ("family", "name", "shape", "message"),
    [
        ("qwen3_moe", "model.layers.1.mlp.experts.5.up_proj.weight", None, "missing"),
        ("qwen3_moe", "model.layers.1.mlp.gate.weight", None, "missing"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.2.w2.weight", None, "missing"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.4.w1.weight", (96, 64), "no place for"),
        ("qwen3_moe", "model.layers.1.mlp.experts.0.up_proj.bias", (48,), "no place for"),
        ("qwen3_moe", "model.layers.0.mlp.experts.0.up_proj.weight", (48, 64), "no place for"),
        ("qwen3_moe", "model.layers.1.mlp.experts.7.down_proj.weight", (64, 47), ""),
    ],
)
def test_experts_are_named(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    directory = copied(checkpoints[family], tmp_path)
    added = {} if shape is None else {name: torch.zeros(shape)}
    rewrite(directory, lambda t: {own: tensor for own, tensor in t.items() if own != name} | added)
    with pytest.raises(ModelLoadError, match=f"{message}.*{re.escape(name.removeprefix('model.'))}"):
        load(directory)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_in_several_files(checkpoints: dict[str, Path], tmp_path: Path, family: str) -> None:
    directory = copied(checkpoints[family], tmp_path)
    before = logits(directory)
    shard(directory)  # an expert's tensors lie in different files
    assert torch.equal(logits(directory), before)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_in_int8(checkpoints: dict[str, Path], family: str) -> None:
    exact, rounded = logits(checkpoints[family]), logits(checkpoints[family], quantization="int8")
    errors = (rounded - exact).norm(dim=1) / exact.norm(dim=1)
    assert 0 < float(errors.median()) < 0.05  # where rounding changes the choice of experts, logits differ more


def test_impossible_numbers_of_experts(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = copied(checkpoints["mixtral"], tmp_path)
    reconfigure(directory, num_experts_per_tok=5)
    with pytest.raises(ModelLoadError, match="num_experts_per_tok=5, but there are 4 experts"):
        load(directory)


def shard(directory: Path) -> dict[str, Any]:
    """Split model.safetensors into two files with an index."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, directory / file)
    index = {"metadata": {}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()
    return index


def test_a_sharded_checkpoint(llama: Path) -> None:
    before = logits(llama)
    shard(llama)
    shutil.copy(llama / "model-00001-of-00002.safetensors", llama / "consolidated.safetensors")  # as Mistral ships
    assert torch.equal(logits(llama), before)


def test_a_missing_shard_is_named(llama: Path) -> None:
    shard(llama)
    (llama / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="model-00002-of-00002"):
        load(llama)


def test_an_index_that_lists_what_no_file_holds(llama: Path) -> None:
    index = shard(llama)
    index["weight_map"]["model.layers.9.extra"] = "model-00001-of-00002.safetensors"
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=r"model\.layers\.9\.extra"):
        load(llama)


def test_a_truncated_file_is_named(llama: Path) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is damaged"):
        load(llama)


def test_no_weights_and_only_pickles(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="has no weights"):
        load(llama)
    (llama / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelLoadError, match="save_pretrained"):
        load(llama)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["RwkvForCausalLM"]}, r"RwkvForCausalLM.*supported: .*LlamaForCausalLM"),
        ({"architectures": ["LlavaForConditionalGeneration"], "hidden_size": ...}, "LlavaForConditionalGeneration"),
        ({"architectures": ...}, "architectures is missing"),
        ({"architectures": ["BertModel"]}, "embeddings"),
        ({"hidden_size": "wide"}, "hidden_size='wide'"),
        ({"num_hidden_layers": ...}, "num_hidden_layers=None"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type='spiral'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "linear"}}, "factor"),
        ({"dtype": "float8"}, "dtype='float8'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ],
    ids=str,
)
def test_a_bad_config_names_its_key(llama: Path, changes: dict[str, Any], message: str) -> None:
    reconfigure(llama, **changes)
    with pytest.raises(ModelLoadError, match=message):
        load(llama)


def test_no_config_and_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json can't be read as JSON"):
        load(tmp_path)


def test_dummy_weights_need_only_a_config_and_repeat(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    first, second = PagedModel(llama, load_format="dummy"), PagedModel(llama, load_format="dummy")
    (one,) = first.step([(first.new_sequence(), IDS)])
    (two,) = second.step([(second.new_sequence(), IDS)])
    assert torch.equal(one, two)
    assert one.std() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(llama: Path, dtype: torch.dtype) -> None:
    reference = logits(llama)
    half = logits(llama, dtype=dtype)
    assert half.dtype == torch.float32
    assert (half - reference).abs().max() < 0.05 * reference.abs().max()


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_int8_is_close(checkpoints: dict[str, Path], name: str) -> None:
    reference = logits(checkpoints[name])
    quantized = logits(checkpoints[name], quantization="int8")
    error = (quantized - reference).square().mean().sqrt() / reference.square().mean().sqrt()
    assert 0 < error < 0.03


def test_int8_is_small(llama: Path) -> None:
    reconfigure(llama, hidden_size=512, intermediate_size=1024)  # small matrices are mostly padding
    plain = weight_bytes(load(llama, load_format="dummy"))
    assert weight_bytes(load(llama, load_format="dummy", quantization="int8")) < 0.35 * plain


def test_quantization_by_an_unknown_name(llama: Path) -> None:
    with pytest.raises(ConfigurationError, match="int3"):
        load(llama, quantization="int3")


def test_int8_on_a_gpu_is_refused_before_anything_is_read(llama: Path) -> None:
    with pytest.raises(ConfigurationError, match="CPU only"):
        load_model(llama, dtype=torch.bfloat16, device=torch.device("cuda"), quantization="int8")


def test_end_of_sequence_comes_from_the_generation_config(llama: Path) -> None:
    (llama / "generation_config.json").unlink()
    assert ModelConfig.from_directory(llama).eos_token_ids == (2,)
    reconfigure(llama, eos_token_id=[7, 8])
    assert ModelConfig.from_directory(llama).eos_token_ids == (7, 8)
    (llama / "generation_config.json").write_text('{"eos_token_id": [9, 8]}')
    assert ModelConfig.from_directory(llama).eos_token_ids == (9, 8)
    (llama / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert ModelConfig.from_directory(llama).eos_token_ids == (9,)
    (llama / "generation_config.json").write_text('{"temperature": 0.6}')
    reconfigure(llama, eos_token_id=None)
    assert ModelConfig.from_directory(llama).eos_token_ids == ()


def test_advised_sampling_comes_from_the_generation_config(llama: Path) -> None:
    assert ModelConfig.from_directory(llama).sampling_defaults == {}
    (llama / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "min_p": null, "max_length": 9}')
    assert ModelConfig.from_directory(llama).sampling_defaults == {"temperature": 0.6, "top_k": 20}
    (llama / "generation_config.json").write_text('{"temperature": "warm"}')
    with pytest.raises(ModelLoadError, match=r"generation_config.json: temperature='warm', expected a number"):
        ModelConfig.from_directory(llama)


def test_dtype_by_both_names_and_by_choice(llama: Path) -> None:
    reconfigure(llama, dtype="float16")
    assert ModelConfig.from_directory(llama).dtype == torch.float16
    reconfigure(llama, dtype=..., torch_dtype="bfloat16")
    config = ModelConfig.from_directory(llama)
    assert config.dtype == torch.bfloat16
    assert resolve_dtype("auto", config) == torch.bfloat16
    assert resolve_dtype("float32", config) == torch.float32
    with pytest.raises(ConfigurationError, match="float64"):
        resolve_dtype("float64", config)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 256),
        ({"type": "linear", "factor": 4.0}, 1024),
        ({"rope_type": "dynamic", "factor": 2.0}, 512),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}, 256),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 256),
    ],
)
def test_the_context_length_counts_the_scaling(llama: Path, scaling: dict[str, Any] | None, expected: int) -> None:
    reconfigure(llama, rope_parameters=..., rope_scaling=scaling, rope_theta=10000.0)
    assert ModelConfig.from_directory(llama).max_model_len == expected


@pytest.mark.parametrize("where", ["rope_parameters", "top"])
def test_a_partial_rotation(llama: Path, where: str) -> None:
    """Half of each head turns; Transformers' Llama can't, so the table is compared."""
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    if where == "top":
        reconfigure(llama, rope_parameters=scaling, partial_rotary_factor=0.5)
    else:
        reconfigure(llama, rope_parameters=scaling | {"partial_rotary_factor": 0.5})
    rope = ModelConfig.from_directory(llama).rope
    assert rope is not None
    table = cos_sin_table(rope, 4, CPU)
    angles = torch.tensor([[p / 2 * 10000.0 ** (-i / 4) for i in range(4)] for p in range(4)])
    assert torch.allclose(table, torch.cat((angles.cos(), angles.sin()), dim=1), atol=1e-6)
    assert torch.isfinite(logits(llama)).all()


def test_resolve_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(tmp_path) == tmp_path
    with pytest.raises(ModelLoadError, match="no directory"):
        resolve_model(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelLoadError, match="is a file"):
        resolve_model(tmp_path / "file")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match=r"some-org/some-model.*give a local directory"):
        resolve_model("some-org/some-model")
