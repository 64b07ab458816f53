"""Models written in Python against Triton's `triton_python_backend_utils`, each instance in a process of its own.

`stub` is what runs in that process. It and the modules it shares with the server (`memory`, `wire`) need the standard
library and numpy alone, as a model may bring its own environment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trine.server.backends.python.backend import PythonBackend

__all__ = ["PythonBackend"]


def __getattr__(name: str) -> Any:
    """Import on first use: a model's process imports this package without the server's dependencies."""
    if name != "PythonBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trine.server.backends.python.backend import PythonBackend

    return PythonBackend
