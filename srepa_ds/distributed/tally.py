"""A count that ranks share while each works at its own pace, and whether one of them has failed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


class Tally:
    """A count of all ranks, kept in the store in which they met; no rank waits for another."""

    def __init__(self, store: dist.Store | None, name: str):
        """Without a store, the count is this process's own."""
        self._store = store
        self._count = f"{name}/count"
        self._failure = f"{name}/failed"
        self._own = 0

    def add(self, count: int) -> int:
        """Adds `count`, and returns what all ranks have added so far."""
        self._own += count
        if self._store is None:
            return self._own
        try:
            return self._store.add(self._count, count)
        except RuntimeError:
            # The rank that hosts the store is gone; the next collective raises that.
            return self._own

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Tells the other ranks if the block raises."""
        try:
            yield
        except BaseException:
            self._tell()
            raise

    def _tell(self) -> None:
        if self._store is None:
            return
        try:
            self._store.set(self._failure, "1")
        except RuntimeError:
            return

    def has_failed(self) -> bool:
        """Returns whether a rank has failed, or the store is gone."""
        if self._store is None:
            return False
        try:
            return self._store.check([self._failure])
        except RuntimeError:
            return True
