"""Triton kernels of compiled graphs, for tensors on a GPU; on a CPU in Triton's interpreter (TRITON_INTERPRET=1)."""
