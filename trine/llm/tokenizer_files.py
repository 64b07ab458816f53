"""What a checkpoint's files say about its tokenizer.

`tokenizer.json` holds the tokenizer proper; `tokenizer_config.json`, `special_tokens_map.json`,
`generation_config.json`, `config.json` and `chat_template.*` hold the rest, with overlaps that grew over the years.
Checkpoints without a `tokenizer.json` are converted: GPT-2's `vocab.json` + `merges.txt` and SentencePiece's
`tokenizer.model` here, others by Transformers when it is installed.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from trine.core.errors import ModelLoadError
from trine.llm.sentencepiece import SentencePieceModel

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CONVERTIBLE = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
    "tiktoken.model",
)


class TokenizerFiles:
    """Reads a model directory; raises ModelLoadError that names the file and the remedy."""

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise ModelLoadError(f"{directory} is not a directory: give the directory that holds tokenizer.json")
        self.directory = directory
        self.config = self._read("tokenizer_config.json")
        self.special_tokens = self._special_tokens()
        self.backend = self._load_backend()
        self._add_tokens()
        self._set_bos_and_eos()

    def _read(self, name: str) -> dict[str, Any]:
        """A JSON object; empty when the file is missing."""
        path = self.directory / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{path} can't be read: {error}. Download the file again") from error
        if not isinstance(value, dict):
            raise ModelLoadError(f"{path} must hold a JSON object, not {type(value).__name__}")
        return value

    def _special_tokens(self) -> dict[str, str]:
        """Text of the special tokens by role: from tokenizer_config.json, else special_tokens_map.json."""
        found: dict[str, str] = {}
        for source in (self._read("special_tokens_map.json"), self.config):
            for role in (*ROLES, *(key for key in source if key.endswith("_token"))):
                value = source.get(role)
                content = value.get("content") if isinstance(value, dict) else value
                if isinstance(content, str):
                    found[role] = content
        return found

    def _load_backend(self) -> Backend:
        path = self.directory / "tokenizer.json"
        if path.is_file():
            try:
                return Backend.from_file(str(path))
            except Exception as error:  # the library raises a bare Exception
                raise ModelLoadError(
                    f"{path} can't be read by tokenizers: {error}. Download it again, or update the tokenizers package"
                ) from error
        kind = self.config.get("tokenizer_class", "GPT2Tokenizer")
        if (self.directory / "merges.txt").is_file() and str(kind).startswith("GPT2"):
            return self._from_vocab_and_merges()
        for name in ("tokenizer.model", "spiece.model"):
            if (self.directory / name).is_file():
                return self._from_sentencepiece(self.directory / name)
        sources = [name for name in CONVERTIBLE if (self.directory / name).is_file()]
        if not sources:
            raise ModelLoadError(
                f"{self.directory} has no tokenizer.json: copy the tokenizer's files of the checkpoint there, "
                "or give prompts as token ids"
            )
        return self._convert(sources[0])

    def _from_vocab_and_merges(self) -> Backend:
        """GPT-2's own files: byte-level BPE, no space added in front."""
        vocab, merges = self.directory / "vocab.json", self.directory / "merges.txt"
        try:
            model = models.BPE.from_file(str(vocab), str(merges))
        except Exception as error:  # the library raises a bare Exception
            raise ModelLoadError(f"{vocab} and {merges.name} can't be read: {error}. Download both again") from error
        backend = Backend(model)
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=bool(self.config.get("add_prefix_space", False))
        )
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        self.special_tokens.setdefault("eos_token", "<|endoftext|>")
        self.special_tokens.setdefault("bos_token", "<|endoftext|>")
        added = sorted(self._read("added_tokens.json").items(), key=lambda item: int(item[1]))
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token, _ in added])
        return backend

    def _from_sentencepiece(self, path: Path) -> Backend:
        """Llama 2's and Mistral's own file. These models begin with BOS unless the configuration says otherwise."""
        try:
            model = SentencePieceModel.read(path)
        except ValueError as error:
            raise ModelLoadError(
                f"{path} is not a SentencePiece model: {error}. Download it again, or the checkpoint's tokenizer.json"
            ) from error
        for role in ("unk", "bos", "eos"):
            token = model.special_token(role)
            if token is not None:
                self.special_tokens.setdefault(f"{role}_token", token)
        if str(self.config.get("tokenizer_class", "Llama")).startswith("Llama"):
            self.config.setdefault("add_bos_token", True)
        return model.to_backend()

    def _convert(self, source: str) -> Backend:
        path = self.directory / source
        remedy = (
            'convert it once with `pip install transformers tiktoken` and `python -c "from transformers import '
            f"AutoTokenizer as T; T.from_pretrained('{self.directory}').save_pretrained('{self.directory}')\"`"
        )
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ModelLoadError(
                f"{path} has no tokenizer.json beside it, and Transformers is not installed: {remedy}"
            ) from error
        try:
            converted = AutoTokenizer.from_pretrained(str(self.directory), use_fast=True)
            backend = converted.backend_tokenizer
        except Exception as error:  # anything may go wrong in the conversion
            raise ModelLoadError(f"{path} could not be converted ({error}): {remedy}") from error
        if not isinstance(backend, Backend):
            raise ModelLoadError(f"{path} has no fast form: {remedy}")
        for role in ROLES:
            content = getattr(converted, role, None)
            if isinstance(content, str):
                self.special_tokens.setdefault(role, content)
        return backend

    def _add_tokens(self) -> None:
        """Adds tokens that only tokenizer_config.json (or special_tokens_map.json) knows, at the ids it gives."""
        known = self.backend.get_added_tokens_decoder()
        listed = self.config.get("added_tokens_decoder") or {}
        for index, fields in sorted((int(index), fields) for index, fields in listed.items()):
            if index in known:
                continue
            flags = {
                key: bool(fields[key]) for key in ("single_word", "lstrip", "rstrip", "normalized") if key in fields
            }
            self._add_token(AddedToken(fields["content"], special=bool(fields.get("special")), **flags), index)
        roles = dict.fromkeys(self.special_tokens[role] for role in ROLES if role in self.special_tokens)
        named = {token.content for token in self.backend.get_added_tokens_decoder().values() if token.special}
        for content in roles:
            if content not in named and self.backend.token_to_id(content) is not None:
                self.backend.add_special_tokens([AddedToken(content, special=True, normalized=False)])

    def _add_token(self, token: AddedToken, index: int) -> None:
        """Adds a token that must have this id: it is in the vocabulary already, or the next free one."""
        if token.special:
            self.backend.add_special_tokens([token])
        else:
            self.backend.add_tokens([token])
        if self.backend.token_to_id(token.content) != index:
            raise ModelLoadError(
                f"{self.directory / 'tokenizer_config.json'}: added_tokens_decoder gives {token.content!r} id {index}, "
                f"but it is {self.backend.token_to_id(token.content)} by tokenizer.json. The two files belong to "
                "different checkpoints: download both again"
            )

    def _set_bos_and_eos(self) -> None:
        """`add_bos_token` and `add_eos_token`, where given, overrule tokenizer.json's post-processor."""
        asked = {side: self.config.get(f"add_{side}_token") for side in ("bos", "eos")}
        if asked["bos"] is None and asked["eos"] is None:
            return
        around = self.backend.encode("").ids
        template: list[str] = ["$A"]
        used: list[tuple[str, int]] = []
        for side, wanted in asked.items():
            content = self.special_tokens.get(f"{side}_token")
            index = None if content is None else self.backend.token_to_id(content)
            if content is None or index is None:
                continue
            if wanted is None:
                wanted = index in (around[:1] if side == "bos" else around[-1:])
            if wanted:
                template.insert(0 if side == "bos" else len(template), content)
                used.append((content, index))
        pair = [*template, *(part if part != "$A" else "$B" for part in template)]
        self.backend.post_processor = processors.TemplateProcessing(single=template, pair=pair, special_tokens=used)

    @functools.cached_property
    def bos_token_id(self) -> int | None:
        content = self.special_tokens.get("bos_token")
        if content is not None:
            index: int | None = self.backend.token_to_id(content)
            return index
        given = self._read("config.json").get("bos_token_id")
        return given if isinstance(given, int) else None

    @functools.cached_property
    def eos_token_ids(self) -> list[int]:
        """generation_config.json's (else config.json's) `eos_token_id`, an id or a list, and the tokenizer's own."""
        given = self._read("generation_config.json").get("eos_token_id")
        if given is None:
            given = self._read("config.json").get("eos_token_id")
        found: list[int] = [given] if isinstance(given, int) else [int(index) for index in given or ()]
        own = self.backend.token_to_id(self.special_tokens.get("eos_token", ""))
        return list(dict.fromkeys([*found, *([] if own is None else [own])]))

    @functools.cached_property
    def chat_templates(self) -> dict[str, str]:
        """Jinja sources by name; the main one is `default`. A file overrules tokenizer_config.json."""
        given = self.config.get("chat_template")
        if given is None:
            given = self._read("chat_template.json").get("chat_template")
        if isinstance(given, str):
            found = {"default": given}
        elif isinstance(given, dict):
            found = {str(name): str(source) for name, source in given.items()}
        else:
            found = {entry["name"]: entry["template"] for entry in given or ()}
        main = self.directory / "chat_template.jinja"
        if main.is_file():
            found["default"] = main.read_text(encoding="utf-8")
        for path in sorted((self.directory / "additional_chat_templates").glob("*.jinja")):
            found[path.stem] = path.read_text(encoding="utf-8")
        return found
