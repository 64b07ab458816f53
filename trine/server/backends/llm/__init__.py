"""Language models: Trine's engine as a back end, with in-flight batching and streaming."""

from __future__ import annotations

from trine.server.backends.llm.backend import LlmBackend, engine_model

__all__ = ["LlmBackend", "engine_model"]
