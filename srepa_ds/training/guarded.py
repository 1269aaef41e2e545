"""Reads batches so that a rank that cannot read its own does not leave the others waiting."""

from collections.abc import Iterator

from srepa_ds.data.batch import Batch
from srepa_ds.errors import DataError


class GuardedBatches:
    """The batches of a loader; when reading fails, the last one again, and the error is kept.

    A rank that left in the middle of a step would keep all others waiting in a collective. So it
    takes part in the step with a batch it still has. The step must not count: the feed makes its
    losses NaN, all ranks skip it, and then they hear of the error.
    """

    def __init__(self, batches: Iterator[Batch]):
        self._batches = batches
        self._last: Batch | None = None
        self._is_ahead = False
        self.failure: DataError | None = None

    def open(self) -> None:
        """Reads the first batch ahead of its use; raises DataError if that fails."""
        if self._last is None:
            self._last = next(self._batches, None)
            self._is_ahead = self._last is not None

    def __iter__(self) -> "GuardedBatches":
        return self

    def __next__(self) -> Batch:
        self.open()
        if self._last is None:
            raise StopIteration
        if self._is_ahead:
            self._is_ahead = False
        elif self.failure is None:
            try:
                self._last = next(self._batches)
            except DataError as error:
                self.failure = error
        return self._last
