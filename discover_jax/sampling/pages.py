"""The page allocator. It runs on the host and counts the users of every page of the cache."""

from collections.abc import Iterable, Sequence


class PageAllocator:
    """Counts the users of every page of a pool. A page without users is free; a page can be shared.

    The pages that it allocates depend only on the order of calls.

    Args:
      total: number of pages.
      first: number of the first page.
    """

    def __init__(self, total: int, first: int = 0):
        self._users = dict.fromkeys(range(first, first + total), 0)
        self._free = list(range(first + total - 1, first - 1, -1))
        self.most_in_use = 0
        """Most pages in use at once."""

    @property
    def free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    @property
    def in_use(self) -> int:
        """Number of pages that have users."""
        return len(self._users) - len(self._free)

    def take(self, count: int) -> list[int] | None:
        """Allocates free pages with one user each. Returns None, and allocates none, if there are too few."""
        if count > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._users[page] = 1
        self.most_in_use = max(self.most_in_use, self.in_use)
        return taken

    def share(self, pages: Sequence[int]) -> list[int]:
        """Adds one user to each page and returns them. Only pages in use can be shared."""
        for page in pages:
            if self._users[page] < 1:
                raise AssertionError(f"page {page} is free and cannot be shared")
            self._users[page] += 1
        return list(pages)

    def release(self, pages: Iterable[int]) -> None:
        """Removes one user from each page. Pages without users become free."""
        freed = []
        for page in pages:
            if self._users[page] < 1:
                raise AssertionError(f"page {page} is already free")
            self._users[page] -= 1
            if not self._users[page]:
                freed.append(page)
        self._free.extend(sorted(freed, reverse=True))
