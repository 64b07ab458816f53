"""What must hold before any test module is imported."""

import os

import torch
from hypothesis import settings

# Shared machines are slow at random moments: no test fails for the time it takes.
settings.register_profile("trine", deadline=None)
settings.load_profile("trine")

if not torch.cuda.is_available():  # the GPU kernels run in Triton's interpreter, chosen before its first import
    os.environ.setdefault("TRITON_INTERPRET", "1")
