"""The safetensors files of a checkpoint directory: what is in them, and their tensors one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trine.core.errors import ModelLoadError
from trine.llm.config import read_json

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, not read yet."""

    name: str
    shape: tuple[int, ...]
    file: Path


class Checkpoint:
    """The tensors of a directory. Raises ModelLoadError when files are missing or damaged."""

    def __init__(self, directory: Path) -> None:
        self.files = weight_files(directory)
        self.tensors = {tensor.name: tensor for file in self.files for tensor in _contents(file)}
        index = read_json(directory / INDEX)
        if index is not None:
            lost = [name for name in index["weight_map"] if name not in self.tensors]
            if lost:
                raise ModelLoadError(
                    f"{directory / INDEX} lists {few(lost)}, which its files do not hold: download again"
                )

    def stream(self) -> Iterator[tuple[StoredTensor, torch.Tensor]]:
        """Every tensor, file by file. Each maps the file; copy it rather than keep it."""
        for file in self.files:
            with _open(file) as opened:
                for name in opened.keys():  # noqa: SIM118  (not a dict: it can't be iterated)
                    yield self.tensors[name], opened.get_tensor(name)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint, by its index if it has one."""
    index = read_json(directory / INDEX)
    if index is not None:
        if not isinstance(index.get("weight_map"), dict):
            raise ModelLoadError(f"{directory / INDEX}: weight_map is missing")
        files = [directory / name for name in sorted(set(index["weight_map"].values()))]
    elif (directory / "model.safetensors").exists():
        files = [directory / "model.safetensors"]
    else:
        files = sorted(directory.glob("*.safetensors"))
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ModelLoadError(f"{directory} lacks {few(missing)}, which {INDEX} lists: download again")
    if not files:
        raise ModelLoadError(f"{directory} has no weights: {_remedy(directory)}")
    return files


def _remedy(directory: Path) -> str:
    if any(directory.glob("*.bin")) or any(directory.glob("*.pth")):
        return (
            "there are PyTorch files (*.bin), which can run code when read; convert them with Transformers: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    return "expected model.safetensors, or several with model.safetensors.index.json"


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{file} is damaged or incomplete ({error}): download it again") from error


def _contents(file: Path) -> list[StoredTensor]:
    with _open(file) as opened:
        return [StoredTensor(name, tuple(opened.get_slice(name).get_shape()), file) for name in opened.keys()]  # noqa: SIM118


def few(names: list[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
