"""The pool of key–value cache blocks: who uses which, what the free ones still hold, and which goes next.

A block is `block_size` consecutive token positions of one sequence, in every layer. Blocks that are full have an
identity, the hash chain of `prefix.py`, and can be shared by sequences that begin alike. A free block keeps its
contents and its identity until it is handed out again, least recently used first: the whole free pool is the prefix
cache (Kwon et al. 2023, PagedAttention, section 4.3; Zheng et al. 2024, SGLang, section 3, for the reuse).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

SCRATCH_BLOCK = 0
"""Never handed out: padded rows of a CUDA graph write here."""


class BlockPool:
    """Reference-counted blocks 1 … num_blocks - 1. Plain bookkeeping; the tensors belong to the worker."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks={num_blocks}: at least 2 are needed (one is the scratch block)")
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._identity: list[bytes | None] = [None] * num_blocks
        self._by_identity: dict[bytes, int] = {}
        # Insertion order is the order of reuse: front first. An OrderedDict removes from the middle in O(1).
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, forgetting what they held. The caller has checked `num_free`."""
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            identity = self._identity[block]
            if identity is not None:
                del self._by_identity[identity]
                self._identity[block] = None
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def lookup(self, identities: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known prefix of `identities`; nothing is taken yet."""
        blocks = []
        for identity in identities:
            block = self._by_identity.get(identity)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are free now, so that sharing them would take them from the free pool."""
        return sum(1 for block in blocks if self._references[block] == 0)

    def share(self, blocks: Iterable[int]) -> None:
        """One more user for each of `blocks`."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One user less. Later blocks are reused before earlier ones, nameless ones before all: heads outlive tails."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._identity[block] is None:
                    self._free.move_to_end(block, last=False)

    def discard(self, blocks: Sequence[int]) -> list[int]:
        """`release` blocks whose contents nobody may find again: those that are free now, without an identity."""
        self.release(blocks)
        free = [block for block in blocks if self._references[block] == 0]
        for block in free:
            identity = self._identity[block]
            if identity is not None:
                del self._by_identity[identity]
                self._identity[block] = None
        return free

    def name(self, block: int, identity: bytes) -> None:
        """Give a full block its identity. The first block of an identity keeps it; a twin stays nameless."""
        if self._identity[block] is None and identity not in self._by_identity:
            self._identity[block] = identity
            self._by_identity[identity] = block

    def forget(self) -> None:
        """Drop the prefix cache: no free block is found again."""
        for identity, block in list(self._by_identity.items()):
            if self._references[block] == 0:
                del self._by_identity[identity]
                self._identity[block] = None

    def check(self, owners: Iterable[Sequence[int]] = ()) -> None:
        """Raise AssertionError unless every block is exactly free or used as often as `owners` hold it."""
        expected = [0] * self.num_blocks
        for blocks in owners:
            for block in blocks:
                expected[block] += 1
        assert expected == self._references, "reference counts differ from the blocks that sequences hold"
        assert SCRATCH_BLOCK not in self._free, "the scratch block is in the free pool"
        for block in range(1, self.num_blocks):
            assert (block in self._free) == (expected[block] == 0), f"block {block} is neither free nor used, or both"
        for identity, block in self._by_identity.items():
            assert self._identity[block] == identity, f"block {block} is found under an identity it does not have"
        assert sum(i is not None for i in self._identity) == len(self._by_identity), "an identity is not in the index"
