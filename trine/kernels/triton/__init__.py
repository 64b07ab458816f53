"""The operations as Triton kernels, for tensors on a GPU; `trine.kernels.reference` says what each one means.

Inside this package `import triton` is the compiler of that name. Its interpreter (TRITON_INTERPRET=1) runs every kernel
here on CPU tensors, which is how the tests run where there is no GPU.
"""

from trine.kernels.triton.activation import gelu, silu_mul
from trine.kernels.triton.attention import paged_attention, supports
from trine.kernels.triton.embedding import embedding
from trine.kernels.triton.gated_linear import linear_silu_mul
from trine.kernels.triton.norm import add_rms_norm, layer_norm, rms_norm
from trine.kernels.triton.qkv import prepare_qkv
from trine.kernels.triton.small_linear import linear, linear_parts, linear_prepare_qkv

__all__ = [
    "add_rms_norm",
    "embedding",
    "gelu",
    "layer_norm",
    "linear",
    "linear_parts",
    "linear_prepare_qkv",
    "linear_silu_mul",
    "paged_attention",
    "prepare_qkv",
    "rms_norm",
    "silu_mul",
    "supports",
]
