"""Tensors of an ONNX file: in the file itself, or in a file beside it that never lies outside the model's folder."""

from __future__ import annotations

import warnings
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trine.graph.dtypes import DType, from_onnx
from trine.graph.errors import ModelFormatError
from trine.graph.operators.room import bytes_of, largest

_TYPED_FIELDS = {
    DType.FLOAT32: "float_data",
    DType.COMPLEX64: "float_data",
    DType.FLOAT64: "double_data",
    DType.COMPLEX128: "double_data",
    DType.INT64: "int64_data",
    DType.UINT64: "uint64_data",
    DType.UINT32: "uint64_data",
}  # all others are in int32_data


def decode_tensor(proto: Any, folder: Path | None) -> tuple[Any, DType]:
    """A TensorProto's data (a tensor; an object array for strings) and type. ModelFormatError says what is wrong."""
    name = proto.name or "(without a name)"
    dtype = from_onnx(proto.data_type)
    if dtype is None:
        raise ModelFormatError(f"tensor {name!r} has element type {proto.data_type}, which is not supported")
    shape = tuple(proto.dims)
    if any(dim < 0 for dim in shape):
        raise ModelFormatError(f"tensor {name!r} has a negative dimension: {list(shape)}")
    if bytes_of(shape, dtype.numpy.itemsize) > largest():
        raise ModelFormatError(f"tensor {name!r} of {dtype} {list(shape)} is larger than this machine's memory")
    count = prod(shape)
    if dtype is DType.STRING:
        if len(proto.string_data) != count:
            raise ModelFormatError(f"tensor {name!r} of shape {list(shape)} has {len(proto.string_data)} strings")
        texts = [text.decode("utf-8", "replace") for text in proto.string_data]
        return np.array(texts, dtype=object).reshape(shape), dtype
    if proto.data_location == 1:
        raw = _external(proto, folder, name)
    elif proto.HasField("raw_data"):
        raw = _owned(proto.raw_data)
    else:
        return _from_fields(proto, dtype, shape, name), dtype
    expected = (count * dtype.bits + 7) // 8
    if len(raw) != expected:
        raise ModelFormatError(
            f"tensor {name!r} of {dtype} {list(shape)} has {len(raw)} bytes of data, expected {expected}: "
            "the file is damaged or cut off; export the model again"
        )
    if dtype.bits == 4:
        return _unpack(raw, dtype, count).reshape(shape), dtype
    if not len(raw):
        return torch.zeros(shape, dtype=dtype.torch), dtype
    if dtype is DType.BOOL:
        return torch.from_numpy(raw != 0).reshape(shape), dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of memory that can't be written to
        return torch.from_numpy(raw).view(dtype.torch).reshape(shape), dtype


def _owned(data: bytes) -> np.ndarray[Any, Any]:
    """An array over the bytes themselves: constants are never written to, so a copy would be waste."""
    return np.frombuffer(data, dtype=np.uint8)


def _unpack(raw: np.ndarray[Any, Any], dtype: DType, count: int) -> torch.Tensor:
    """Two numbers a byte, the first in the low half."""
    halves = np.stack([raw & 15, raw >> 4], 1).reshape(-1)[:count].astype(np.int16)
    if dtype is DType.INT4:
        halves = np.where(halves > 7, halves - 16, halves)
    return torch.from_numpy(halves.astype(np.uint8 if dtype is DType.UINT4 else np.int8))


def _from_fields(proto: Any, dtype: DType, shape: tuple[int, ...], name: str) -> torch.Tensor:
    data = getattr(proto, _TYPED_FIELDS.get(dtype, "int32_data"))
    count = prod(shape)
    per_element = 2 if dtype.value.startswith("complex") else 1
    stored = (count + 1) // 2 if dtype.bits == 4 else count * per_element
    if len(data) != stored:
        raise ModelFormatError(f"tensor {name!r} of {dtype} {list(shape)} has {len(data)} numbers, expected {stored}")
    if dtype.bits == 4:
        return _unpack(np.array(data, dtype=np.uint8), dtype, count).reshape(shape)
    if per_element == 2:
        halves = np.array(data, dtype=np.float32 if dtype is DType.COMPLEX64 else np.float64)
        return torch.from_numpy(halves.view(dtype.numpy).reshape(shape))
    if dtype in (DType.FLOAT16, DType.BFLOAT16) or dtype.value.startswith("float8"):  # bits in integers
        bits = np.array(data, dtype=np.uint16 if dtype.torch.itemsize == 2 else np.uint8)
        return torch.from_numpy(bits).view(dtype.torch).reshape(shape)
    return torch.from_numpy(np.array(data).astype(dtype.numpy)).reshape(shape)


def _external(proto: Any, folder: Path | None, name: str) -> np.ndarray[Any, Any]:
    """The bytes, mapped from their file (a write goes to a private copy)."""
    entries = {entry.key: entry.value for entry in proto.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise ModelFormatError(f"tensor {name!r} is in the file {location!r}: give the model's path, not its bytes")
    path = _inside(folder, location, name)
    try:
        offset = int(entries.get("offset", 0))
        size = path.stat().st_size
        length = int(entries.get("length", size - offset))
    except ValueError:
        raise ModelFormatError(f"tensor {name!r}: offset and length of external data must be numbers") from None
    if offset < 0 or length < 0 or offset + length > size:
        raise ModelFormatError(
            f"tensor {name!r} is at bytes {offset} to {offset + length} of {location!r}, which has {size}"
        )
    if length == 0:
        return np.zeros(0, dtype=np.uint8)
    return np.memmap(path, dtype=np.uint8, mode="c", offset=offset, shape=(length,))


def _inside(folder: Path, location: str, name: str) -> Path:
    """`location` in `folder`, links followed; ModelFormatError when it is not a file within it."""
    try:
        root = folder.resolve()
        path = (root / location).resolve()
        fits = bool(location) and path.is_relative_to(root) and path.is_file()
    except (OSError, ValueError, RuntimeError):
        fits = False
    if not fits:
        raise ModelFormatError(
            f"tensor {name!r} wants the file {location!r}, which is not in the model's folder: put its data there"
        )
    return path
