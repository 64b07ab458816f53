"""The block pool against a model that is obviously right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trine.llm.cache.blocks import BlockPool
from trine.llm.cache.prefix import extend_identities, root_identity


def test_blocks_come_back_and_are_reused_least_recently_used_first() -> None:
    pool = BlockPool(5)
    first, second = pool.allocate(2), pool.allocate(2)
    assert sorted(first + second) == [1, 2, 3, 4]
    for index, block in enumerate(first):
        pool.name(block, b"first%d" % index)
    for index, block in enumerate(second):
        pool.name(block, b"second%d" % index)
    pool.release(first)
    pool.release(second)
    # The tail of the older sequence goes first; its head survives it.
    assert pool.allocate(1) == [first[1]]
    assert pool.lookup([b"first0", b"first1"]) == [first[0]]
    assert pool.lookup([b"second0", b"second1"]) == second


def test_nameless_blocks_are_reused_before_cached_ones() -> None:
    pool = BlockPool(4)
    named, nameless = pool.allocate(1), pool.allocate(1)
    pool.name(named[0], b"x")
    pool.release(named)
    pool.release(nameless)
    assert pool.allocate(1) == nameless


def test_shared_blocks_are_free_only_when_the_last_user_is_gone() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(1)
    pool.name(blocks[0], b"x")
    pool.share(pool.lookup([b"x"]))
    pool.release(blocks)
    assert pool.num_used == 1
    pool.release(blocks)
    assert pool.num_used == 0
    assert pool.lookup([b"x"]) == blocks


def test_discarded_blocks_are_not_found_again() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    for block in blocks:
        pool.name(block, bytes([block]))
    pool.share(blocks[:1])
    assert pool.discard(blocks) == blocks[1:], "somebody still uses the first"
    assert [pool.lookup([bytes([block])]) for block in blocks] == [blocks[:1], [], []]
    pool.check([blocks[:1]])


def test_forget_empties_the_prefix_cache_but_not_blocks_in_use() -> None:
    pool = BlockPool(4)
    kept, dropped = pool.allocate(1), pool.allocate(1)
    pool.name(kept[0], b"kept")
    pool.name(dropped[0], b"dropped")
    pool.release(dropped)
    pool.forget()
    assert pool.lookup([b"kept"]) == kept
    assert pool.lookup([b"dropped"]) == []
    pool.check([kept])


def test_check_notices_a_leak() -> None:
    pool = BlockPool(4)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check([])


def test_identity_depends_on_tokens_parents_and_salt() -> None:
    def identities(tokens: list[int], salt: str | None = None) -> list[bytes]:
        result: list[bytes] = []
        extend_identities(result, tokens, 2, root_identity(salt), len(tokens))
        return result

    base = identities([1, 2, 3, 4])
    assert len(base) == 2
    assert identities([1, 2, 9, 9])[0] == base[0]
    assert identities([9, 9, 3, 4])[1] != base[1]  # same tokens, other parent
    assert not set(identities([1, 2, 3, 4], "tenant")) & set(base)
    assert len({*base, *identities([2, 1, 4, 3])}) == 4


@given(st.data())
def test_random_use_keeps_the_pool_whole(data: st.DataObject) -> None:
    pool = BlockPool(data.draw(st.integers(2, 12)))
    held: list[list[int]] = []
    names = iter(range(10**6))
    contents: dict[bytes, int] = {}
    for _ in range(data.draw(st.integers(0, 40))):
        action = data.draw(st.sampled_from(["allocate", "release", "name", "share"]))
        if action == "allocate" and pool.num_free:
            taken = pool.allocate(data.draw(st.integers(1, pool.num_free)))
            contents = {name: block for name, block in contents.items() if block not in taken}
            held.append(taken)
        elif action == "release" and held:
            pool.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
        elif action == "name" and held:
            block = data.draw(st.sampled_from(data.draw(st.sampled_from(held))))
            if block not in contents.values():
                name = b"%d" % next(names)
                pool.name(block, name)
                contents[name] = block
        elif action == "share" and contents:
            found = pool.lookup([data.draw(st.sampled_from(sorted(contents)))])
            assert len(found) == 1
            pool.share(found)
            held.append(found)
        pool.check(held)
        assert all(pool.lookup([name]) == [block] for name, block in contents.items())
