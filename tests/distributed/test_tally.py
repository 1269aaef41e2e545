import pytest
import torch.distributed as dist

from srepa_ds.distributed.tally import Tally


def test_ranks_share_a_count_and_hear_of_a_failure():
    store = dist.HashStore()
    one, two, other = (Tally(store, name) for name in ("pass/1", "pass/1", "pass/2"))
    assert one.add(3) == 3
    assert two.add(4) == 7
    assert one.add(0) == 7
    assert other.add(1) == 1
    assert not two.has_failed()
    with pytest.raises(ZeroDivisionError), one.failing():
        raise ZeroDivisionError
    assert two.has_failed()
    assert not other.has_failed()


def test_without_a_store_a_process_counts_alone():
    tally = Tally(None, "pass")
    with pytest.raises(ZeroDivisionError), tally.failing():
        raise ZeroDivisionError
    assert [tally.add(2), tally.add(3)] == [2, 5]
    assert not tally.has_failed()


class GoneStore(dist.HashStore):
    """A store whose host has ended."""

    def add(self, *_):
        raise dist.DistNetworkError("connection reset")

    set = check = add


def test_where_the_store_is_gone_work_ends():
    tally = Tally(GoneStore(), "pass")
    assert tally.add(5) == 5
    assert tally.has_failed()
    with pytest.raises(ZeroDivisionError), tally.failing():
        raise ZeroDivisionError
