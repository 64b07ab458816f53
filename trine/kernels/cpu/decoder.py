"""A whole stack of decoder layers in one call of the native library (csrc/decoder.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch

from trine.kernels.cpu.native import load
from trine.kernels.cpu.weights import DTYPES, PackedWeight
from trine.kernels.types import DecoderLayer, PagedBatch


class _Layer(ctypes.Structure):
    """DecoderLayer in csrc/runtime.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("qkv", "output", "gate_up", "down")),
        *((name, c_void_p) for name in ("qkv_bias", "output_bias", "gate_up_bias", "down_bias")),
        *((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm", "k_cache", "v_cache")),
        ("window", c_int64),
    )


class _Args(ctypes.Structure):
    """DecoderArgs in csrc/runtime.h."""

    _fields_ = (
        ("layers", c_void_p),
        ("count", c_int64),
        *((name, c_void_p) for name in ("final_norm", "residual", "out", "output_rows")),
        ("output_count", c_int64),
        *((name, c_void_p) for name in ("positions", "slots", "cos_sin", "query_start", "seq_lens", "block_table")),
        *((name, c_int64) for name in ("tokens", "sequences", "block_table_stride", "hidden", "heads", "kv_heads")),
        *((name, c_int64) for name in ("head_dim", "rotary_dim", "block_size")),
        ("eps", c_float),
        ("scale", c_float),
        ("dtype", c_int32),
        ("cache_dtype", c_int32),
    )


class Decoder:
    """Layers with their weights and caches, ready to run. For one thread at a time."""

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        final_norm: torch.Tensor,
        *,
        eps: float,
        num_heads: int,
        scale: float,
        cos_sin: torch.Tensor | None,
    ) -> None:
        library, status = load()
        if library is None:
            raise RuntimeError(f"the native CPU kernels are not there: {status}")
        self._run = library.trine_decoder
        self._owned = (list(layers), final_norm, cos_sin)  # what the pointers below point to
        self._layers = (_Layer * len(layers))(*map(_layer, layers))
        k_cache = layers[0].k_cache
        _, num_kv_heads, block_size, head_dim = k_cache.shape
        self._dtype = final_norm.dtype
        self._args = _Args(
            layers=ctypes.addressof(self._layers),
            count=len(layers),
            final_norm=final_norm.data_ptr(),
            cos_sin=None if cos_sin is None else cos_sin.data_ptr(),
            hidden=final_norm.shape[0],
            heads=num_heads,
            kv_heads=num_kv_heads,
            head_dim=head_dim,
            rotary_dim=0 if cos_sin is None else cos_sin.shape[1],
            block_size=block_size,
            eps=eps,
            scale=scale,
            dtype=DTYPES[final_norm.dtype],
            cache_dtype=DTYPES[k_cache.dtype],
        )
        self._address = ctypes.addressof(self._args)

    def __call__(self, residual: torch.Tensor, batch: PagedBatch) -> torch.Tensor:
        """The embeddings [T, H], which are overwritten, to the last layer's normed hidden states: of all tokens
        [T, H], or of `batch.output_rows` alone.
        """
        tokens, hidden = residual.shape
        rows = batch.output_rows
        out = torch.empty((tokens if rows is None else rows.shape[0], hidden), dtype=self._dtype)
        args = self._args
        args.residual = residual.data_ptr()
        args.out = out.data_ptr()
        args.output_rows = None if rows is None else rows.data_ptr()
        args.output_count = -1 if rows is None else rows.shape[0]
        args.positions = batch.positions.data_ptr()
        args.slots = batch.slots.data_ptr()
        args.query_start = batch.query_start.data_ptr()
        args.seq_lens = batch.seq_lens.data_ptr()
        args.block_table = batch.block_table.data_ptr()
        args.tokens = tokens
        args.sequences = batch.seq_lens.shape[0]
        args.block_table_stride = batch.block_table.stride(0)
        self._run(self._address)
        return out


def _layer(layer: DecoderLayer) -> _Layer:
    def pointer(tensor: torch.Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    def handle(weight: object) -> int:
        assert isinstance(weight, PackedWeight)
        return weight.handle

    return _Layer(
        qkv=handle(layer.qkv),
        output=handle(layer.output),
        gate_up=handle(layer.gate_up),
        down=handle(layer.down),
        qkv_bias=pointer(layer.qkv_bias),
        output_bias=pointer(layer.output_bias),
        gate_up_bias=pointer(layer.gate_up_bias),
        down_bias=pointer(layer.down_bias),
        input_norm=layer.input_norm.data_ptr(),
        post_norm=layer.post_norm.data_ptr(),
        q_norm=pointer(layer.q_norm),
        k_norm=pointer(layer.k_norm),
        k_cache=layer.k_cache.data_ptr(),
        v_cache=layer.v_cache.data_ptr(),
        window=layer.sliding_window or 0,
    )


def can_run(layers: Sequence[DecoderLayer], final_norm: torch.Tensor) -> bool:
    """Whether `Decoder` runs these: all weights packed by this library, one float dtype of norms and biases."""
    if not layers or final_norm.dtype not in DTYPES or final_norm.is_cuda:
        return False
    for layer in layers:
        if not all(isinstance(w, PackedWeight) for w in (layer.qkv, layer.output, layer.gate_up, layer.down)):
            return False
        biases = [layer.qkv_bias, layer.output_bias, layer.gate_up_bias, layer.down_bias]
        norms = [layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm]
        if any(tensor is not None and tensor.dtype != final_norm.dtype for tensor in biases + norms):
            return False
        if layer.k_cache.is_cuda or layer.k_cache.dtype not in DTYPES:
            return False
    return True
