"""llama.cpp, by the C interface of llama-cpp-python: a batch in one decode call, the best token taken on the host."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp as llama
import numpy as np


class Engine:
    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self.version = llama.__version__
        self.device = f"CPU, {settings['threads']} threads"
        llama.llama_backend_init()
        self._quiet = llama.llama_log_callback(lambda *_: None)
        llama.llama_log_set(self._quiet, ctypes.c_void_p(0))
        options = llama.llama_model_default_params()
        options.use_mmap = False
        self._model = llama.llama_model_load_from_file(settings["gguf"].encode(), options)
        if not self._model:
            raise RuntimeError(f"{settings['gguf']} can't be loaded")
        self._context: Any = None
        self._sequences = 0

    def _prepare(self, sequences: int, prompt_len: int) -> None:
        """A context for this many sequences; kept while the number stays the same."""
        if self._sequences == sequences:
            llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
            return
        if self._context is not None:
            llama.llama_batch_free(self._batch)
            llama.llama_free(self._context)
        options = llama.llama_context_default_params()
        options.n_ctx = self._settings["max_len"] * sequences
        options.n_batch = self._settings["max_len"] * sequences
        options.n_ubatch = 512
        options.n_seq_max = sequences
        options.n_threads = options.n_threads_batch = self._settings["threads"]
        self._context = llama.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError("no context: too little memory")
        self._batch = llama.llama_batch_init(self._settings["max_len"] * sequences, 0, 1)
        self._sequences = sequences

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """Entries are (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        if llama.llama_decode(self._context, batch) != 0:
            raise RuntimeError("decode failed")

    def _best(self, row: int) -> int:
        logits = llama.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._settings["vocab_size"],)).argmax())

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        length = len(prompts[0])
        self._prepare(len(prompts), length)
        self._decode([(t, i, s, i == length - 1) for s, own in enumerate(prompts) for i, t in enumerate(own)])
        tokens = [[self._best(s * length + length - 1)] for s in range(len(prompts))]
        for step in range(1, new):
            self._decode([(own[-1], length + step - 1, s, True) for s, own in enumerate(tokens)])
            for s, own in enumerate(tokens):
                own.append(self._best(s))
        return tokens
