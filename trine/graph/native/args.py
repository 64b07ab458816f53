"""Arguments of the kernels, laid out as csrc has them. A tape fills in the pointers."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_float, c_int32, c_int64, c_void_p

ACTIVATIONS = ("", "relu", "relu6", "sigmoid", "tanh", "silu", "hardswish", "gelu", "gelu_tanh")
"""Activation of csrc/runtime.h, by number."""


class Weight(ctypes.Structure):
    """Weight in csrc/runtime.h: a matrix [n, k] in panels."""

    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        *((name, c_int64) for name in ("n", "k", "k_padded", "panels", "panel_bytes", "data_bytes", "scale_bytes")),
        ("group", c_int64),
        ("dtype", c_int32),
    )


class LinearArgs(ctypes.Structure):
    """LinearArgs in csrc/runtime.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "x", "bias", "out")),
        ("rows", c_int64),
        ("x_stride", c_int64),
        ("x_dtype", c_int32),
        ("out_dtype", c_int32),
        ("silu_mul", c_bool),
        ("residual", c_void_p),
        ("residual_stride", c_int64),
        ("out_stride", c_int64),
        ("activation", c_int32),
    )


CHAIN_DIMS, CHAIN_INPUTS, CHAIN_OUTPUTS, CHAIN_OPS, CHAIN_REGISTERS, CHAIN_BLOCK = 6, 10, 4, 24, 16, 256


class ChainInput(ctypes.Structure):
    """ChainInput in csrc/kernels/chain.h."""

    _fields_ = (("data", c_void_p), ("strides", c_int64 * CHAIN_DIMS), ("dtype", c_int32), ("to", c_int32))


class ChainOutput(ctypes.Structure):
    """ChainOutput in csrc/kernels/chain.h."""

    _fields_ = (("data", c_void_p), ("dtype", c_int32), ("source", c_int32))


class ChainOp(ctypes.Structure):
    """ChainOp in csrc/kernels/chain.h."""

    _fields_ = (
        *((name, c_int32) for name in ("code", "to", "a", "b", "c", "reserved")),
        ("p", c_float),
        ("q", c_float),
        ("n", c_int64),
    )


class ChainArgs(ctypes.Structure):
    """ChainArgs in csrc/kernels/chain.h."""

    _fields_ = (
        ("inputs", ChainInput * CHAIN_INPUTS),
        ("outputs", ChainOutput * CHAIN_OUTPUTS),
        ("ops", ChainOp * CHAIN_OPS),
        ("shape", c_int64 * CHAIN_DIMS),
        ("count", c_int64),
        ("task", c_int64),
        *((name, c_int32) for name in ("input_count", "output_count", "op_count", "dims")),
    )


COPY_DIMS = 8


class CopyArgs(ctypes.Structure):
    """CopyArgs in csrc/kernels/copy.h."""

    _fields_ = (
        ("x", c_void_p),
        ("y", c_void_p),
        *((name, c_int64 * COPY_DIMS) for name in ("shape", "x_strides", "y_strides")),
        *((name, c_int64) for name in ("dims", "itemsize", "turned")),
    )


class SoftmaxArgs(ctypes.Structure):
    """SoftmaxArgs in csrc/kernels/rows.h."""

    _fields_ = (
        ("x", c_void_p),
        ("y", c_void_p),
        *((name, c_int64) for name in ("outer", "size", "inner", "logarithm")),
    )


class RowNormArgs(ctypes.Structure):
    """RowNormArgs in csrc/kernels/rows.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "scale", "bias", "y")),
        ("rows", c_int64),
        ("size", c_int64),
        ("epsilon", c_float),
        *((name, c_int32) for name in ("rms", "x_dtype", "y_dtype")),
    )


class GroupNormArgs(ctypes.Structure):
    """GroupNormArgs in csrc/kernels/rows.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "scale", "bias", "y")),
        *((name, c_int64) for name in ("outer", "channels", "places", "groups")),
        ("epsilon", c_float),
        ("channels_last", c_int32),
    )


class ReduceArgs(ctypes.Structure):
    """ReduceArgs in csrc/kernels/rows.h."""

    _fields_ = (("x", c_void_p), ("y", c_void_p), *((name, c_int64) for name in ("outer", "size", "inner", "kind")))


class GatherArgs(ctypes.Structure):
    """GatherArgs in csrc/kernels/gather.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "indices", "y")),
        *((name, c_int64) for name in ("outer", "size", "row_bytes", "count", "wide")),
    )


MATMUL_DIMS = 4


class MatmulArgs(ctypes.Structure):
    """MatmulArgs in csrc/kernels/matmul.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("a", "b", "y")),
        *((name, c_int64 * MATMUL_DIMS) for name in ("shape", "a_strides", "b_strides")),
        *((name, c_int64) for name in ("m", "n", "k", "a_row", "b_row", "b_column")),
    )


class GraphAttentionArgs(ctypes.Structure):
    """GraphAttentionArgs in csrc/kernels/matmul.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "mask", "y")),
        *((name, c_int64 * 4) for name in ("q_strides", "k_strides", "v_strides", "mask_strides", "y_strides")),
        *((name, c_int64) for name in ("batch", "heads", "queries", "keys", "size", "v_size")),
        ("scale", c_float),
        ("guarded", c_int32),
        ("y_dtype", c_int32),
    )
