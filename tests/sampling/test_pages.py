"""The page allocator, compared with naive lists of users."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.sampling.pages import PageAllocator

MOVES = st.lists(st.tuples(st.sampled_from(["take", "share", "release"]), st.integers(0, 7)), max_size=60)


@given(total=st.integers(1, 12), moves=MOVES)
def test_the_allocator_agrees_with_lists_of_users(total, moves):
    allocator, holders, most = PageAllocator(total), [], 0
    for kind, number in moves:
        if kind == "take":
            free = allocator.free
            taken = allocator.take(number)
            assert (taken is None) == (number > free)
            if taken is not None:
                assert len(set(taken)) == number
                assert not set(taken) & {page for pages in holders for page in pages}
                holders.append(taken)
        elif holders and kind == "share":
            holders.append(allocator.share(holders[number % len(holders)]))
        elif holders:
            allocator.release(holders.pop(number % len(holders)))
        users = collections.Counter(page for pages in holders for page in pages)
        most = max(most, len(users))
        assert allocator.in_use == len(users)
        assert allocator.free == total - len(users)
        assert allocator.most_in_use == most
        assert all(0 <= page < total for page in users)


def test_free_pages_can_be_neither_shared_nor_released():
    allocator = PageAllocator(3)
    (page,) = allocator.take(1)
    allocator.release([page])
    with pytest.raises(AssertionError):
        allocator.release([page])
    with pytest.raises(AssertionError):
        allocator.share([page])
