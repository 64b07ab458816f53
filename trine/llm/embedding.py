"""Sentence embeddings from BERT-type checkpoints, as sentence-transformers' configuration files describe them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from tokenizers import BertWordPieceTokenizer, Tokenizer

from trine.core.errors import ModelLoadError, RequestError
from trine.llm.checkpoint import Checkpoint
from trine.llm.config import ModelConfig, read_json, read_json_list, resolve_dtype
from trine.llm.loading import load_weights, resolve_model
from trine.llm.models import encoder_class
from trine.llm.models.base import Build
from trine.llm.quantization import linear_method

Floats = npt.NDArray[np.float32]

MAX_BATCH_TOKENS = 8192
"""Tokens in one forward pass: enough to fill the processor, few enough for its memory."""

POOLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls": lambda x: x[:, 0],
    "max": lambda x: x.amax(dim=1),
    "mean": lambda x: x.mean(dim=1),
    "mean_sqrt_len_tokens": lambda x: x.sum(dim=1) / x.shape[1] ** 0.5,
    "lasttoken": lambda x: x[:, -1],
}
"""From hidden states [n, length, H] to [n, H], by sentence-transformers' names."""

_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What sentence-transformers does around the encoder. Several poolings are put side by side."""

    poolings: tuple[str, ...] = ("mean",)
    normalize: bool = False
    max_seq_len: int | None = None
    lower_case: bool = False
    prompt: str = ""

    @classmethod
    def from_directory(cls, directory: Path) -> Recipe:
        """Read modules.json and what it names. Without it: mean pooling, as sentence-transformers does then."""
        transformer = read_json(directory / "sentence_bert_config.json") or {}
        settings = read_json(directory / "config_sentence_transformers.json") or {}
        prompt = (settings.get("prompts") or {}).get(settings.get("default_prompt_name") or "", "")
        poolings: tuple[str, ...] = ("mean",)
        normalize = False
        for module in read_json_list(directory / "modules.json") or []:
            kind = str(module.get("type", "")).rpartition(".")[2]
            if kind == "Pooling":
                poolings = _poolings(read_json(directory / str(module.get("path", "")) / "config.json") or {})
            elif kind == "Normalize":
                normalize = True
            elif kind != "Transformer":
                raise ModelLoadError(
                    f"{directory / 'modules.json'}: module {kind!r} is not supported; "
                    "supported: Transformer, Pooling, Normalize"
                )
        return cls(
            poolings, normalize, transformer.get("max_seq_length"), bool(transformer.get("do_lower_case")), prompt
        )


def _poolings(config: dict[str, Any]) -> tuple[str, ...]:
    """The pooling modes of a 1_Pooling/config.json: `pooling_mode`, or one flag each as older versions wrote it."""
    given = config.get("pooling_mode") or [mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag)] or "mean"
    modes = (given,) if isinstance(given, str) else tuple(given)
    unknown = [mode for mode in modes if mode not in POOLINGS]
    if unknown:
        raise ModelLoadError(f"pooling mode {unknown[0]!r} is not supported; supported: {', '.join(POOLINGS)}")
    return modes


class EmbeddingModel:
    """Texts to vectors. Sequences are sorted by length and packed, so that nothing is computed for padding."""

    def __init__(self, model: str | Path, dtype: str = "float32", device: str = "auto") -> None:
        """`model` is a directory or a name on the hub. Raises ModelLoadError or ConfigurationError."""
        directory = resolve_model(model)
        config = ModelConfig.from_directory(directory)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        build = Build(
            self.device,
            resolve_dtype(dtype, config),
            linear_method(None, self.device),
            config.max_model_len,
        )
        self.model = encoder_class(config.architecture)(config, build).eval()
        load_weights(self.model, Checkpoint(directory), self.model.names, self.device)
        self.recipe = Recipe.from_directory(directory)
        self.tokenizer = _tokenizer(directory)
        self.vocab_size = config.vocab_size
        self.max_model_len = min(self.recipe.max_seq_len or config.max_model_len, config.max_model_len)
        self.tokenizer.enable_truncation(self.max_model_len)
        self.dimension = config.hidden_size * len(self.recipe.poolings)

    @torch.inference_mode()
    def embed(
        self, inputs: Sequence[str] | Sequence[Sequence[int]], dimensions: int | None = None
    ) -> tuple[Floats, list[int]]:
        """Vectors [N, dimensions] and the number of tokens of each input.

        Texts are tokenised with the special tokens and cut at the model's length, as in sentence-transformers; token
        ids are taken as they are. `dimensions` keeps the first so many, normalised again if the model normalises.
        Raises RequestError naming the input or field that is wrong.
        """
        if dimensions is not None and not 1 <= dimensions <= self.dimension:
            raise RequestError(
                f"dimensions={dimensions} is out of range: this model has {self.dimension}", param="dimensions"
            )
        sequences = self._tokenize(inputs)
        output = np.empty((len(sequences), dimensions or self.dimension), dtype=np.float32)
        for batch in _batches(sequences):
            vectors = self._pool([sequences[i] for i in batch])[:, :dimensions]
            if self.recipe.normalize:
                vectors = F.normalize(vectors, dim=1)
            output[batch] = vectors.cpu().numpy()
        return output, [len(ids) for ids in sequences]

    def _tokenize(self, inputs: Sequence[str] | Sequence[Sequence[int]]) -> list[Sequence[int]]:
        texts = [text for text in inputs if isinstance(text, str)]
        if len(texts) == len(inputs):
            texts = [self.recipe.prompt + text.strip() for text in texts]
            if self.recipe.lower_case:
                texts = [text.lower() for text in texts]
            return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        sequences: list[Sequence[int]] = []
        for number, ids in enumerate(cast("Sequence[Sequence[int] | str]", inputs)):
            if isinstance(ids, str):
                raise RequestError("input mixes texts and token ids: give one or the other", param="input")
            if not 1 <= len(ids) <= self.max_model_len:
                raise RequestError(
                    f"input {number} has {len(ids)} tokens: expected 1 to {self.max_model_len}", param="input"
                )
            if min(ids) < 0 or max(ids) >= self.vocab_size:
                raise RequestError(f"input {number} has a token id outside 0 to {self.vocab_size - 1}", param="input")
            sequences.append(ids)
        return sequences

    def _pool(self, sequences: list[Sequence[int]]) -> torch.Tensor:
        """Vectors [N, dimension] float32 of sequences in order of length."""
        runs = [(len(list(group)), length) for length, group in groupby(len(ids) for ids in sequences)]
        token_ids = torch.tensor([token for ids in sequences for token in ids], device=self.device)
        positions = torch.cat([torch.arange(length, device=self.device).repeat(count) for count, length in runs])
        hidden = self.model(token_ids, positions, runs).float()
        vectors = []
        start = 0
        for count, length in runs:
            run = hidden[start : start + count * length].view(count, length, -1)
            start += count * length
            vectors.append(torch.cat([POOLINGS[mode](run) for mode in self.recipe.poolings], dim=1))
        return torch.cat(vectors)


def _tokenizer(directory: Path) -> Tokenizer:
    """tokenizer.json without the padding and truncation that were saved in it, or WordPiece from vocab.txt."""
    if (directory / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    if not (directory / "vocab.txt").exists():
        raise ModelLoadError(f"{directory} has neither tokenizer.json nor vocab.txt: download again")
    settings = read_json(directory / "tokenizer_config.json") or {}
    lowercase = bool(settings.get("do_lower_case", True))
    return cast(Tokenizer, BertWordPieceTokenizer(str(directory / "vocab.txt"), lowercase=lowercase))


def _batches(sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices in order of length, in batches of at most MAX_BATCH_TOKENS tokens (or one sequence)."""
    batches: list[list[int]] = []
    budget = 0
    for index in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
        if len(sequences[index]) > budget:
            batches.append([])
            budget = MAX_BATCH_TOKENS
        batches[-1].append(index)
        budget -= len(sequences[index])
    return batches
