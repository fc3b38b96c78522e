"""Which pages of the cache belong to whom: the host's book of a pool of pages, some of them shared."""

from collections.abc import Iterable, Sequence


class PageAllocator:
    """Counts the users of every page of a pool; a page without users is free.

    What lies where depends on the order of calls alone.

    Args:
      total: pages of the pool.
      first: number of the first of them.
    """

    def __init__(self, total: int, first: int = 0):
        self._users = dict.fromkeys(range(first, first + total), 0)
        self._free = list(range(first + total - 1, first - 1, -1))
        self.most_in_use = 0
        """The most pages that were in use at once."""

    @property
    def free(self) -> int:
        """How many pages are free."""
        return len(self._free)

    @property
    def in_use(self) -> int:
        """How many pages have users."""
        return len(self._users) - len(self._free)

    def take(self, count: int) -> list[int] | None:
        """That many free pages, each with one user now; None, and nothing is taken, if there are too few."""
        if count > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._users[page] = 1
        self.most_in_use = max(self.most_in_use, self.in_use)
        return taken

    def share(self, pages: Sequence[int]) -> list[int]:
        """The same pages, each with one user more. Only pages in use can be shared."""
        for page in pages:
            if self._users[page] < 1:
                raise AssertionError(f"page {page} is free and cannot be shared")
            self._users[page] += 1
        return list(pages)

    def release(self, pages: Iterable[int]) -> None:
        """One user less for each page; those without any are free again."""
        freed = []
        for page in pages:
            if self._users[page] < 1:
                raise AssertionError(f"page {page} is free already")
            self._users[page] -= 1
            if not self._users[page]:
                freed.append(page)
        self._free.extend(sorted(freed, reverse=True))
