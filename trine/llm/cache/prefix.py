"""The identity of a full cache block: a hash of its tokens, its parent and what else changes its contents."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

_ROOT = b"trine"


def root_identity(salt: str | None = None) -> bytes:
    """The parent of a sequence's first block. `salt` (adapter, tenant, …) keeps equal tokens apart."""
    return _ROOT if salt is None else blake2b(salt.encode(), digest_size=16, key=_ROOT).digest()


def extend_identities(
    identities: list[bytes], token_ids: Sequence[int], block_size: int, root: bytes, num_tokens: int
) -> None:
    """Append the identities of the full blocks of `token_ids[:num_tokens]` that `identities` does not have yet.

    A cryptographic hash, because a collision would serve one user the contents of another's prompt.
    """
    for index in range(len(identities), num_tokens // block_size):
        parent = identities[-1] if identities else root
        tokens = array("I", token_ids[index * block_size : (index + 1) * block_size])
        identities.append(blake2b(parent + tokens.tobytes(), digest_size=16).digest())
