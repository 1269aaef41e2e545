"""Units of work that processes take from a folder, so that a slow one does not hold the others."""

import random
import time
import zlib
from collections.abc import Callable, Iterator, Sequence

from srepa_ds.distributed.heartbeat import moved
from srepa_ds.files import writing
from srepa_ds.sampling.claims import Claims, Process
from srepa_ds.sampling.generate import Chunk
from srepa_ds.sampling.writer import CURE, ChunkWriter

_SHORTEST_WAIT, _LONGEST_WAIT = 0.05, 2.0


class Units:
    """The chunks that this process takes of `chunks`, one after another.

    Chunks are taken by claims, which are given back by `done`. Nothing here communicates: what
    others do is seen in the folder.
    """

    def __init__(
        self,
        writer: ChunkWriter,
        chunks: Sequence[Chunk],
        claims: Claims,
        *,
        goes_on: Callable[[], bool] = lambda: True,
    ):
        """`goes_on` is asked before each chunk; once it says no, no more are taken."""
        self._writer = writer
        self._chunks = chunks
        self._claims = claims
        self._goes_on = goes_on
        self._wait = _SHORTEST_WAIT
        self._longest = 0.0
        self._begun: dict[int, float] = {}
        # Processes begin at different places, and seldom reach for the same chunk.
        name = f"{Process.own().name}"
        self._begin = zlib.crc32(name.encode()) / 2**32

    def runs(self, look: Callable[[], None] = lambda: None) -> Iterator[Iterator[Chunk]]:
        """Yields runs of chunks to draw, until every chunk is drawn by this process or another.

        Each run is to be drawn to its end, and holds one chunk at least. Between runs, while others
        hold all the chunks that are left, `look` is called now and then: their owners may die. An
        owner may also hang, or be much slower: after the time of a stale claim, and at least twice
        that of the longest chunk so far, chunks that others hold are drawn too. Raises OutputError.
        """
        waits_since = time.monotonic()
        while self._goes_on() and (missing := self._writer.missing(self._chunks)):
            run = self._taken(missing)
            first = next(run, None)
            if first is not None:
                self._wait = _SHORTEST_WAIT
                yield _chained(first, run)
                waits_since = time.monotonic()
                continue
            patience = max(self._claims.seconds, 2 * self._longest)
            if time.monotonic() - waits_since > patience:
                # Not the same one as all others that wait.
                held = random.choice(missing)
                self._begun[held.index] = time.monotonic()
                yield iter((held,))
                continue
            moved()
            look()
            time.sleep(self._wait * random.uniform(0.5, 1.0))
            self._wait = min(2 * self._wait, _LONGEST_WAIT)

    def done(self, chunk: Chunk) -> None:
        """Gives the claim on a chunk back, whose part is written; raises OutputError."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._begun.pop(chunk.index, now))
        with writing(self._writer.folder, cure=CURE):
            self._claims.release(self._name(chunk))

    def _taken(self, missing: Sequence[Chunk]) -> Iterator[Chunk]:
        """Yields those of the `missing` chunks that are free when their turn comes."""
        begin = int(self._begin * len(missing))
        for chunk in (*missing[begin:], *missing[:begin]):
            if not self._goes_on():
                return
            if self._take(chunk):
                self._begun[chunk.index] = time.monotonic()
                yield chunk

    def _take(self, chunk: Chunk) -> bool:
        with writing(self._writer.folder, cure=CURE):
            try:
                if self._writer.parts.has(chunk) or not self._claims.take(self._name(chunk)):
                    return False
            except FileNotFoundError:
                # The parts are gone: the set is finished, or a person removed them.
                self._writer.make_room()
                return False
            if self._writer.parts.has(chunk):
                # Written between the two looks.
                self._claims.release(self._name(chunk))
                return False
            return True

    @staticmethod
    def _name(chunk: Chunk) -> str:
        return f"chunk-{chunk.index:06d}"


def _chained(first: Chunk, others: Iterator[Chunk]) -> Iterator[Chunk]:
    yield first
    yield from others
