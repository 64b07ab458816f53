"""What must hold before any test module is imported."""

import os

import torch

if not torch.cuda.is_available():  # the GPU kernels run in Triton's interpreter, chosen before its first import
    os.environ.setdefault("TRITON_INTERPRET", "1")
