"""Ranks that are done early wait for the others, however long those take."""

import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from ranks import run_function

from srepa_ds.distributed import ranks
from srepa_ds.errors import DataError
from srepa_ds.preparation.progress import run_through

LIMIT = 1.0


def run_with_one_slow_rank(*, fails):
    own = ranks.initialize()
    ranks.barrier()
    dist.set_timeout(timedelta(seconds=LIMIT), dist.group.WORLD)

    def counts():
        yield 1
        if own.number == 1:
            time.sleep(2 * LIMIT)
            if fails:
                raise DataError("a late failure")
        yield 1

    began = time.monotonic()
    try:
        run_through(counts(), total=4, what="images")
    except DataError as error:
        return str(error), time.monotonic() - began
    return "", time.monotonic() - began


def run_both_ways():
    return [run_with_one_slow_rank(fails=fails) for fails in (False, True)]


@pytest.mark.slow
def test_a_slow_rank_may_take_longer_than_a_collective():
    for without, failing in run_function(run_both_ways, 2):
        assert without[0] == ""
        assert failing[0] == "a late failure"
        assert all(LIMIT < seconds < 20 * LIMIT for _, seconds in (without, failing))
