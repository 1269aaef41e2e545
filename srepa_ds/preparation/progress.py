"""Runs through the work of all ranks: shows how far they are, and ends them when one fails."""

import time
from collections.abc import Generator
from contextlib import closing

from srepa_ds.console import Progress
from srepa_ds.distributed import ranks
from srepa_ds.distributed.heartbeat import moved

_SECONDS_BETWEEN_LOOKS = 0.5


def run_through(counts: Generator[int, None, None], *, total: int, what: str) -> None:
    """Takes what `counts` yields, on each rank its own; `total` is that of all. Collective.

    A rank that fails ends the others at their next step, and all raise its error.
    """
    tally = ranks.tally()
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

        ranks.together(go)
        if total:
            progress.at(tally.add(0))
