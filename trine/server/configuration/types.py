"""Datatypes as configurations name them (TYPE_FP32, TYPE_STRING) and as the protocol does (FP32, BYTES)."""

from __future__ import annotations

from trine.server.proto import pb
from trine.server.tensors import NUMPY_TYPES

_NAMES: dict[int, str] = {
    number: "BYTES" if name == "TYPE_STRING" else name.removeprefix("TYPE_") for name, number in pb.DataType.items()
}
_NUMBERS = {name: number for number, name in _NAMES.items()}


def datatype_name(number: int) -> str:
    """The protocol's name of a DataType: "FP32", "BYTES"; "INVALID" for the unset one."""
    return _NAMES.get(number, "INVALID")


def datatype_number(name: str) -> int:
    """The DataType of a protocol's name; TYPE_INVALID where there is none."""
    return _NUMBERS.get(name, 0)


def item_size(datatype: str) -> int:
    """Bytes an element takes; 0 for BYTES."""
    return 0 if datatype == "BYTES" else NUMPY_TYPES[datatype].itemsize
