"""A rank that stands still is named by the others, with the place where it was last seen."""

import logging
import sys
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from srepa_ds.distributed import heartbeat, ranks
from srepa_ds.distributed.heartbeat import Heartbeat, moved, stuck_seconds
from srepa_ds.errors import TopologyError

SECONDS = 1.0


def beating(store: dist.Store, rank: int, *, world_size: int = 2) -> Heartbeat:
    where = f"rank {rank} (here)"
    return Heartbeat(store, rank=rank, world_size=world_size, where=where, seconds=SECONDS)


def heard(caplog: pytest.LogCaptureFixture, words: str, *, within: float = 20.0) -> str:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        moved()
        for record in caplog.records:
            if words in record.getMessage():
                return record.getMessage()
        time.sleep(0.02)
    raise AssertionError(f"nobody said {words!r}: {[r.getMessage() for r in caplog.records]}")


@pytest.fixture(autouse=True)
def _listening(caplog):
    caplog.set_level(logging.WARNING, logger="srepa_ds")


def test_nobody_is_named_while_all_move(caplog):
    store = dist.HashStore()
    with beating(store, 0), beating(store, 1):
        until = time.monotonic() + 3 * SECONDS
        while time.monotonic() < until:
            moved()
            time.sleep(0.02)
    assert not caplog.records


def test_a_silent_rank_is_named_with_its_last_place(caplog):
    store = dist.HashStore()
    with beating(store, 0), beating(store, 1):
        time.sleep(SECONDS)
    # Rank 1 publishes nothing any more, like a process that is stopped.
    with beating(store, 0):
        text = heard(caplog, "rank 1 (here) has given no sign of life")
    assert "in test_a_silent_rank_is_named_with_its_last_place" in text


def test_a_rank_that_was_never_heard_is_named(caplog):
    with beating(dist.HashStore(), 0):
        heard(caplog, "rank 1 has given no sign of life")


def test_a_silent_rank_that_comes_back_is_named_once_more(caplog):
    store = dist.HashStore()
    with beating(store, 0):
        with beating(store, 1):
            time.sleep(SECONDS)
        heard(caplog, "rank 1 (here) has given no sign of life")
        with beating(store, 1):
            heard(caplog, "rank 1 (here) moves again")
    said = [r for r in caplog.records if "rank 1 (here) has given no sign" in r.getMessage()]
    assert len(said) == 1


def test_a_main_thread_that_stands_still_is_named_with_its_stack(caplog):
    def stands_still_here() -> None:
        threading.Event().wait(4 * SECONDS)

    with beating(dist.HashStore(), 0, world_size=1):
        stands_still_here()
    text = caplog.records[0].getMessage()
    assert text.startswith("rank 0 (here) may be stuck: for")
    assert "in stands_still_here" in text


def test_a_rank_waits_in_torch_s_collectives_and_not_in_its_own_work():
    def waits_here() -> bool:
        return heartbeat._waits(list(heartbeat._frames(sys._getframe())))

    assert not ranks.together(waits_here)
    source = "def all_gather(look):\n    return look()"
    names: dict[str, Any] = {}
    exec(compile(source, "site-packages/torch/distributed/distributed_c10d.py", "exec"), names)
    assert ranks.together(names["all_gather"], waits_here)


def test_the_deputy_names_a_main_rank_that_is_silent(caplog):
    with beating(dist.HashStore(), 1):
        heard(caplog, "rank 0 has given no sign of life")


class Frozen(dist.Store):
    """A store whose host is stopped: it answers nothing, and raises nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()

    def set(self, *_: object) -> None:
        self.ended.wait()

    check = get = set


def test_a_store_that_does_not_answer_keeps_nobody_from_naming_its_host(caplog):
    store = Frozen()
    watch = beating(store, 1)
    with watch:
        heard(caplog, "rank 0 has given no sign of life")
        store.ended.set()


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "inf", "nan"])
def test_the_seconds_are_a_number(monkeypatch, text):
    monkeypatch.setenv(heartbeat.STUCK_SECONDS, text)
    with pytest.raises(TopologyError, match="SREPA_STUCK_SECONDS"):
        stuck_seconds()
