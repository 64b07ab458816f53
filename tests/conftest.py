"""What must hold before any test module is imported."""

import os

import torch

if not torch.cuda.is_available():  # Triton's interpreter runs the GPU kernels; it must be chosen before the first import
    os.environ.setdefault("TRITON_INTERPRET", "1")
