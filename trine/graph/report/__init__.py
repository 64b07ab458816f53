"""What a build did, for people: as text, and as one HTML page with a picture of the graph."""

from __future__ import annotations

from trine.graph.report.page import page
from trine.graph.report.text import text

__all__ = ["page", "text"]
