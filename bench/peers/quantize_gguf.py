"""python quantize_gguf.py IN.gguf OUT.gguf: Q8_0, by llama.cpp's own quantizer."""

from __future__ import annotations

import ctypes
import os
import sys

import llama_cpp as llama

options = llama.llama_model_quantize_default_params()
options.ftype = llama.LLAMA_FTYPE_MOSTLY_Q8_0
options.nthread = len(os.sched_getaffinity(0))
sys.exit(llama.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(options)))
