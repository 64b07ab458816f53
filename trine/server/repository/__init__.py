"""The model repository: which models there are, which are ready, and how one takes another's place."""

from __future__ import annotations

from trine.server.repository.entries import IndexEntry
from trine.server.repository.repository import Repository
from trine.server.repository.settings import RepositorySettings

__all__ = ["IndexEntry", "Repository", "RepositorySettings"]
