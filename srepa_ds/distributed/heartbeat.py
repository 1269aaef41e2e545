"""Heartbeats: a thread of each rank tells the others that it moves; one that stops is named.

A rank that is frozen, or waits for a disk that does not answer, looks to the others like a slow
collective. So each rank publishes where its main thread is, and how long it has been there.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple

import torch.distributed as dist

import srepa_ds
from srepa_ds.distributed.surroundings import seconds_in_environment

log = logging.getLogger("srepa_ds")

STUCK_SECONDS = "SREPA_STUCK_SECONDS"
"""Names the seconds without a sign of movement after which a rank is named; 300 by default."""

# Of a stack: the innermost frames, and those of this package.
_INNERMOST, _OWN = 4, 8
_PACKAGE = str(Path(srepa_ds.__file__).parent)
_RANKS_NAMED = 4
# A rank whose main thread is in one of these calls waits for others.
_TORCH_DISTRIBUTED = os.path.join("torch", "distributed") + os.sep
# The rank that names others, and the one that does it when the first is silent.
_READERS = 2


def stuck_seconds() -> float:
    """Returns the seconds after which a rank that does not move is named.

    Raises TopologyError if `SREPA_STUCK_SECONDS` is not a positive number.
    """
    return seconds_in_environment(STUCK_SECONDS, 300.0)


class Beat(NamedTuple):
    """What a rank publishes of itself."""

    where: str
    """The rank and its machine."""

    count: int
    """The number of beats so far: while it grows, the process is alive."""

    still_seconds: float
    """How long its main thread has been at the same place, without progress."""

    waits: bool
    """Whether that place is a collective, so that another rank is at fault."""

    stack: tuple[str, ...]
    """The frames of the main thread that are shown, innermost first."""


_moves = 0


def moved() -> None:
    """Notes that this rank makes progress, however similar its steps look from outside."""
    global _moves
    _moves += 1


class Heartbeat:
    """Publishes this rank's beat, and names ranks that stand still; a context manager."""

    def __init__(
        self, store: dist.Store, *, rank: int, world_size: int, where: str, seconds: float
    ):
        """Takes a store of its own: one that another thread waits in would make this one wait."""
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._where = where
        self._seconds = seconds
        self._interval = min(10.0, seconds / 5)
        self._main = threading.main_thread().ident
        self._ended = threading.Event()
        # Two, because a store whose host is frozen may keep the first waiting for ever.
        self._threads = [self._thread(self._beat)]
        self._threads += [self._thread(self._watch)] if rank < _READERS else []
        self._count = 0
        self._place: object = None
        self._there_since = time.monotonic()
        self._beats: dict[int, Beat] = {}
        self._heard_at = dict.fromkeys(range(world_size), time.monotonic())
        self._exchanged_at = time.monotonic()
        self._has_store = True
        self._named: set[int] = set()

    def __enter__(self) -> "Heartbeat":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads; a store that does not answer holds this up for an interval at most."""
        self._ended.set()
        for thread in self._threads:
            thread.join(self._interval)

    def _thread(self, target: Callable[[], None]) -> threading.Thread:
        return threading.Thread(target=target, daemon=True, name="heartbeat")

    def _beat(self) -> None:
        while not self._ended.wait(self._interval):
            own = self._own()
            if self._has_store:
                self._exchange(own)
            else:
                self._hear(self._rank, own)

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            self._name()

    def _own(self) -> Beat:
        frames = list(_frames(sys._current_frames().get(self._main or 0)))
        place = (_moves, [(id(frame.f_code), frame.f_lasti) for frame in frames])
        now = time.monotonic()
        if place != self._place:
            self._place, self._there_since = place, now
        self._count += 1
        stack = tuple(map(_line, _shown(frames)))
        waits = _waits(frames)
        return Beat(self._where, self._count, round(now - self._there_since, 1), waits, stack)

    def _exchange(self, own: Beat) -> None:
        """Publishes this rank's beat; a reader takes the others'."""
        try:
            self._store.set(f"beat/{self._rank}", json.dumps(own))
            if self._rank < _READERS:
                for rank in range(self._world_size):
                    if self._store.check([f"beat/{rank}"]):
                        self._hear(rank, json.loads(self._store.get(f"beat/{rank}")))
            self._exchanged_at = time.monotonic()
        except (RuntimeError, ValueError):
            # The store is gone, and with it the rank that hosts it. Each further try would print
            # a trace of torch's own.
            self._has_store = False
            self._hear(self._rank, own)

    def _hear(self, rank: int, fields: Iterable[object]) -> None:
        beat = Beat(*fields)  # type: ignore[arg-type]
        if rank not in self._beats or self._beats[rank].count != beat.count:
            self._heard_at[rank] = time.monotonic()
        self._beats[rank] = beat

    def _name(self) -> None:
        now = time.monotonic()
        silent = {rank for rank, at in self._heard_at.items() if now - at > self._seconds}
        if now - self._exchanged_at > self._seconds:
            # Nobody can be heard through the store that rank 0 hosts.
            silent = {0}
        if self._rank > 0 and 0 not in silent:
            return
        still = {rank for rank, beat in self._beats.items() if beat.still_seconds > self._seconds}
        still -= silent
        at_fault = {rank for rank in still if not self._beats[rank].waits}
        # Where all wait, they wait for one that is silent, or for the network.
        found = silent | (at_fault or (set() if silent else still))
        new = sorted(found - self._named)[:_RANKS_NAMED]
        for rank in new:
            log.warning("%s", self._words(rank, is_silent=rank in silent))
        moving = {rank for rank in self._named - found if rank not in still}
        for rank in sorted(moving & self._beats.keys()):
            log.warning("%s moves again", self._beats[rank].where)
        self._named = (self._named - moving) | set(new)

    def _words(self, rank: int, *, is_silent: bool) -> str:
        beat = self._beats.get(rank)
        if beat is None:
            return f"rank {rank} has given no sign of life for {self._seconds:.0f} s"
        if is_silent:
            seconds = time.monotonic() - self._heard_at[rank]
            text = f"{beat.where} has given no sign of life for {seconds:.0f} s: it is stopped, or "
            text += "its machine cannot be reached; it was last seen"
        else:
            text = f"{beat.where} may be stuck: for {beat.still_seconds:.0f} s it has been"
        return "\n    ".join([f"{text} at", *beat.stack])


def _frames(frame: FrameType | None) -> Iterable[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _waits(frames: list[FrameType]) -> bool:
    """Returns whether the innermost frame of torch or this package is in a collective.

    `ranks.together` does not count: the rank does its own work inside it.
    """
    for frame in frames:
        name = frame.f_code.co_filename
        if _TORCH_DISTRIBUTED in name:
            return True
        if name.startswith(_PACKAGE):
            return False
    return False


def _shown(frames: list[FrameType]) -> list[FrameType]:
    own = [frame for frame in frames if frame.f_code.co_filename.startswith(_PACKAGE)][:_OWN]
    return [frame for frame in frames if frame in own or frame in frames[:_INNERMOST]]


def _line(frame: FrameType) -> str:
    # Not the source line: reading it may hang, if a disk is what everything waits for.
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
