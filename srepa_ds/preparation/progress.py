"""Runs through the work of all ranks: shows how far they are, and ends them when one fails."""

import time
from collections.abc import Generator
from contextlib import closing

from srepa_ds.console import Progress
from srepa_ds.distributed import ranks
from srepa_ds.distributed.heartbeat import moved
from srepa_ds.distributed.tally import Tally

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_POLLS = 0.1


def run_through(counts: Generator[int, None, None], *, total: int, what: str) -> None:
    """Takes what `counts` yields, on each rank its own; `total` is that of all. Collective.

    A rank that fails ends the others at their next step, and all raise its error. A rank that is
    done waits for the others however long they take.
    """
    tally, ended = ranks.tally(), ranks.tally()
    with Progress(what, total=total, is_main=ranks.rank() == 0) as progress:

        def go() -> None:
            waiting, looked_at = 0, time.monotonic()
            with tally.failing(), closing(counts):
                for count in counts:
                    moved()
                    waiting += count
                    if time.monotonic() - looked_at < _SECONDS_BETWEEN_LOOKS:
                        continue
                    progress.at(tally.add(waiting))
                    if tally.has_failed():
                        return
                    waiting, looked_at = 0, time.monotonic()
                tally.add(waiting)
                ended.add(1)
            _wait_for_others(tally, ended, progress)

        ranks.together(go)
        if total:
            progress.at(tally.add(0))


def _wait_for_others(tally: Tally, ended: Tally, progress: Progress) -> None:
    """Returns when all ranks have ended, or one has failed.

    By looking again and again: a collective has a limit, and a shard may take hours.
    """
    while ended.add(0) < ranks.world_size() and not tally.has_failed():
        moved()
        progress.at(tally.add(0))
        time.sleep(_SECONDS_BETWEEN_POLLS)
