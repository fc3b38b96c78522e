"""The book of pages, against one that is kept naively: who uses what."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.sampling.pages import Pages

MOVES = st.lists(st.tuples(st.sampled_from(["take", "share", "release"]), st.integers(0, 7)), max_size=60)


@given(total=st.integers(1, 12), moves=MOVES)
def test_no_page_has_two_owners_and_none_is_lost(total, moves):
    book, holders, most = Pages(total), [], 0
    for kind, number in moves:
        if kind == "take":
            free = book.free
            taken = book.take(number)
            assert (taken is None) == (number > free)
            if taken is not None:
                assert len(set(taken)) == number
                assert not set(taken) & {page for pages in holders for page in pages}
                holders.append(taken)
        elif holders and kind == "share":
            holders.append(book.share(holders[number % len(holders)]))
        elif holders:
            book.release(holders.pop(number % len(holders)))
        users = collections.Counter(page for pages in holders for page in pages)
        most = max(most, len(users))
        assert book.in_use == len(users)
        assert book.free == total - len(users)
        assert book.most_in_use == most
        assert all(0 <= page < total for page in users)


def test_free_pages_can_be_neither_shared_nor_released():
    book = Pages(3)
    (page,) = book.take(1)
    book.release([page])
    with pytest.raises(AssertionError):
        book.release([page])
    with pytest.raises(AssertionError):
        book.share([page])
