"""DLPack, by its C structures: numpy's own support leaves out BF16, capsules from elsewhere and older versions.

The layout is that of dlpack.h, version 0.x ("dltensor" capsules), which every framework reads.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from trine.server.backends.python.stub.errors import TritonModelException

Array = np.ndarray[Any, Any]

CPU, CUDA, CUDA_HOST = 1, 2, 3
_INT, _UINT, _FLOAT, _BFLOAT, _BOOL = 0, 1, 2, 4, 6
_TYPES = {
    "BOOL": (_BOOL, 8),
    "UINT8": (_UINT, 8),
    "UINT16": (_UINT, 16),
    "UINT32": (_UINT, 32),
    "UINT64": (_UINT, 64),
    "INT8": (_INT, 8),
    "INT16": (_INT, 16),
    "INT32": (_INT, 32),
    "INT64": (_INT, 64),
    "FP16": (_FLOAT, 16),
    "FP32": (_FLOAT, 32),
    "FP64": (_FLOAT, 64),
    "BF16": (_BFLOAT, 16),
}
_DATATYPES = {number: name for name, number in _TYPES.items()}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("type_bits", ctypes.c_uint8),
        ("type_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_get_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_is_valid_of = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_set_name = ctypes.pythonapi.PyCapsule_SetName
_set_name.argtypes = (ctypes.py_object, ctypes.c_char_p)
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.argtypes = (ctypes.py_object, ctypes.c_char_p)

_NAME, _USED = b"dltensor", b"used_dltensor"  # held here: a capsule keeps the pointer, not a copy
_exported: dict[int, tuple[Any, ...]] = {}
"""What exported tensors need alive, by the address of their structure."""


def _release(managed: Any) -> None:
    _exported.pop(ctypes.addressof(managed.contents), None)


def _drop_unused(capsule: int) -> None:
    """A capsule that nobody took over is gone."""
    if _is_valid_of(capsule, _NAME):
        _exported.pop(_get_pointer_of(capsule, _NAME), None)


_on_release = _Deleter(_release)
_on_drop = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_drop_unused)


def export(content: Array, datatype: str, shape: tuple[int, ...]) -> Any:
    """A capsule of `content`'s memory, which lives as long as whoever takes the capsule wants."""
    dimensions = (ctypes.c_int64 * max(len(shape), 1))(*shape)
    code, bits = _TYPES[datatype]
    managed = _Managed()
    tensor = managed.tensor
    tensor.data = content.ctypes.data
    tensor.device_type, tensor.device_id, tensor.ndim = CPU, 0, len(shape)
    tensor.type_code, tensor.type_bits, tensor.type_lanes = code, bits, 1
    tensor.shape = ctypes.cast(dimensions, ctypes.POINTER(ctypes.c_int64))
    managed.deleter = _on_release
    address = ctypes.addressof(managed)
    _exported[address] = (managed, dimensions, content)
    return _new_capsule(address, _NAME, ctypes.cast(_on_drop, ctypes.c_void_p))


class _Imported:
    """Somebody else's tensor; its memory is theirs until this is gone."""

    def __init__(self, managed: Any, address: int, size: int) -> None:
        self._managed = managed
        self.__array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }

    def __del__(self) -> None:
        if self._managed.contents.deleter:
            self._managed.contents.deleter(self._managed)


def load(source: Any) -> tuple[str, tuple[int, ...], Array]:
    """Datatype, shape and bytes of a capsule or of an object with `__dlpack__`."""
    capsule = source if type(source).__name__ == "PyCapsule" else _capsule_of(source)
    if not _is_valid(capsule, _NAME):
        raise TritonModelException("not a DLPack capsule that is still to be used")
    managed = ctypes.cast(_get_pointer(capsule, _NAME), ctypes.POINTER(_Managed))
    tensor = managed.contents.tensor
    shape = tuple(tensor.shape[: tensor.ndim])
    _check_contiguous(tensor, shape)
    if tensor.device_type not in (CPU, CUDA_HOST):
        raise TritonModelException(
            f"a DLPack capsule on device type {tensor.device_type}: pass the tensor itself, or move it to the CPU"
        )
    datatype = _DATATYPES.get((tensor.type_code, tensor.type_bits))
    if datatype is None or tensor.type_lanes != 1:
        raise TritonModelException(
            f"DLPack type (code {tensor.type_code}, {tensor.type_bits} bits) is no datatype of a tensor"
        )
    size = tensor.type_bits // 8
    for dimension in shape:
        size *= dimension
    _set_name(capsule, _USED)
    owner = _Imported(managed, (tensor.data or 0) + tensor.byte_offset, size)
    return datatype, shape, np.asarray(owner) if size else np.empty(0, np.uint8)


def _capsule_of(source: Any) -> Any:
    if not hasattr(source, "__dlpack__") or not hasattr(source, "__dlpack_device__"):
        raise TritonModelException(
            "Provided tensor is not supported. Tensor must be a DLPack capsule or have `__dlpack__` and "
            "`__dlpack_device__` attributes"
        )
    kind = source.__dlpack_device__()[0]
    if kind == CUDA and hasattr(source, "cpu"):
        source = source.cpu()
    elif kind not in (CPU, CUDA_HOST):
        raise TritonModelException(f"DLPack device type {int(kind)} is not supported: move the tensor to the CPU")
    return source.__dlpack__()


def _check_contiguous(tensor: _Tensor, shape: tuple[int, ...]) -> None:
    if not tensor.strides:
        return
    expected = 1
    for size, stride in zip(reversed(shape), reversed(tensor.strides[: tensor.ndim]), strict=True):
        if size != 1 and stride != expected:
            raise TritonModelException(
                "DLPack tensor is not contiguous. Only contiguous DLPack tensors that are stored in C-Order are "
                "supported."
            )
        expected *= size
