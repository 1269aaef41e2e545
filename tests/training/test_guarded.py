"""Batches that cannot be read: the last one again, and the error kept for all ranks."""

from collections.abc import Iterator

import pytest
import torch

from srepa_ds.data.batch import Batch
from srepa_ds.errors import DataError
from srepa_ds.training.guarded import GuardedBatches


def batch(number: int) -> Batch:
    one = torch.tensor([number])
    return Batch(images=None, moments=None, labels=one, sample_ids=one, positions=one)


A, B = batch(0), batch(1)


def failing_after(batches: list[Batch]) -> Iterator[Batch]:
    yield from batches
    raise DataError("the shard is gone")


def test_a_batch_read_ahead_is_not_lost():
    batches = GuardedBatches(iter([A, B]))
    batches.open()
    batches.open()
    assert [next(batches) for _ in "ab"] == [A, B]
    assert next(batches, None) is None


def test_the_last_batch_stands_in_for_what_cannot_be_read():
    batches = GuardedBatches(failing_after([A, B]))
    assert [next(batches) for _ in "ab"] == [A, B]
    assert batches.failure is None
    assert [next(batches) for _ in "ab"] == [B, B]
    assert str(batches.failure) == "the shard is gone"


def test_a_failure_before_the_first_batch_is_raised():
    with pytest.raises(DataError, match="the shard is gone"):
        GuardedBatches(failing_after([])).open()
