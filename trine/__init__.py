"""Trine: one open inference stack. `from trine import LLM, SamplingParams` is the way in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from trine.llm.api import LLM, AsyncLLM
    from trine.llm.outputs import CompletionOutput, RequestOutput
    from trine.llm.sampling.params import GuidedParams, SamplingParams

__all__ = ["LLM", "AsyncLLM", "CompletionOutput", "GuidedParams", "RequestOutput", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "trine.llm.api",
    "AsyncLLM": "trine.llm.api",
    "SamplingParams": "trine.llm.sampling.params",
    "GuidedParams": "trine.llm.sampling.params",
    "RequestOutput": "trine.llm.outputs",
    "CompletionOutput": "trine.llm.outputs",
}


def __getattr__(name: str) -> Any:
    """Import on first use (PEP 562), so that `trine --help` does not pay for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'trine' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
