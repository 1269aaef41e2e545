"""Files of a data set that stay open: any bytes of any of them, read at their place.

They are read, not mapped. A mapped file that is truncated, or whose disk fails, ends the process
without a message, and nothing can be tried again. Mapping saves little time that matters: on one
core, from memory and in random batches of 32, reading delivered 10,000 samples of raw pixels (256
px) and moments per second (mapped: 30,000), or 45,000 of moments (170,000). To decode the same
pixels from WebP takes ten times as long as to read them raw.
"""

import errno
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from srepa_ds.data.reading import DEFAULT_READING, TRANSIENT, Reading
from srepa_ds.errors import DataError

log = logging.getLogger("srepa_ds")

_WAIT_SECONDS = 1.0
"""The wait before the second attempt; each further one waits as much longer."""
_MOST_OPEN = 160
"""Open files of one data set. A process may have 1,024; ImageNet's 129 shards fit."""


class Identity(NamedTuple):
    """Tells a file from another one in its place, and from itself after a change."""

    device: int
    inode: int
    size: int
    modified: int
    """Nanoseconds."""

    @classmethod
    def of(cls, file: int | Path) -> "Identity":
        """Returns the identity of an open descriptor or a path; raises OSError."""
        found = os.stat(file)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class StoredFile:
    """A file whose header was checked."""

    path: Path
    identity: Identity
    starts: Mapping[str, int]
    """The offset of each tensor in the file, in bytes."""
    again: str
    """The cure for a damaged file, for messages."""


class Request(NamedTuple):
    """Bytes to read: `room` is filled from `offset` of file `number` on."""

    number: int
    offset: int
    room: memoryview


Failure = tuple[Request, OSError]


class OpenFiles:
    """Numbered files, each opened on first use.

    A file that stays open is read as it was even if it is removed or replaced. Not for use by
    several threads at once; processes may share it.
    """

    def __init__(self, files: Sequence[StoredFile], reading: Reading = DEFAULT_READING):
        self.files = tuple(files)
        self._reading = reading
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None
        self._pool_process = 0

    def __getstate__(self) -> dict[str, Any]:
        # A worker process that is not forked opens the files itself.
        return {**self.__dict__, "_descriptors": OrderedDict(), "_pool": None}

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        if self._pool is not None and self._pool_process == os.getpid():
            self._pool.shutdown(wait=False)

    def start(self, number: int, name: str) -> int:
        """Returns the offset of a tensor in a file, in bytes."""
        return self.files[number].starts[name]

    def read(self, requests: Sequence[Request]) -> None:
        """Fills the rooms of `requests`.

        Transient errors are tried again, after one second, two, and so on. Raises DataError.
        """
        for attempt in range(1, self._reading.attempts + 1):
            failures = self._failures(requests)
            if not failures:
                return
            request, error = failures[0]
            if attempt == self._reading.attempts or any(
                error.errno not in TRANSIENT for _, error in failures
            ):
                raise self._unreadable(request, error) from error
            self._announce(request, error, attempt)
            time.sleep(attempt * _WAIT_SECONDS)
            self._forget_stale(failures)
            requests = [request for request, _ in failures]

    def damaged(self, number: int, reason: str) -> DataError:
        """Returns the error to raise for a file whose contents contradict themselves."""
        file = self.files[number]
        return DataError(f"{file.path}: {reason}; {file.again}")

    def _failures(self, requests: Sequence[Request]) -> list[Failure]:
        """Reads what can be read; returns the rest."""
        failures: list[Failure] = []
        # A group has at most as many files as may be open, so opening one closes none of them.
        for first in range(0, len(requests), _MOST_OPEN):
            opened = []
            for request in requests[first : first + _MOST_OPEN]:
                try:
                    opened.append((request, self._descriptor(request.number)))
                except OSError as error:
                    failures.append((request, error))
            failures += self._filled(opened)
        return failures

    def _filled(self, opened: list[tuple[Request, int]]) -> Iterator[Failure]:
        """Fills the rooms, in threads if there is more than one; yields the failures."""
        count = min(self._reading.threads, len(opened))
        if count <= 1:
            yield from self._fill(opened)
            return
        for failures in self._threads().map(self._fill, [opened[k::count] for k in range(count)]):
            yield from failures

    def _threads(self) -> ThreadPoolExecutor:
        # A forked process inherits the pool without its threads.
        if self._pool is None or self._pool_process != os.getpid():
            self._pool = ThreadPoolExecutor(self._reading.threads, "srepa-ds-read")
            self._pool_process = os.getpid()
        return self._pool

    def _fill(self, opened: list[tuple[Request, int]]) -> list[Failure]:
        failures: list[Failure] = []
        for request, descriptor in opened:
            _, offset, room = request
            done = 0
            try:
                while done < len(room):
                    # At the place given, not at the descriptor's, which forked processes share.
                    read = os.preadv(descriptor, [room[done:]], offset + done)
                    if read == 0:
                        raise self._truncated(request.number, descriptor)
                    done += read
            except OSError as error:
                failures.append((request, error))
        return failures

    def _truncated(self, number: int, descriptor: int) -> DataError:
        size, now = self.files[number].identity.size, os.fstat(descriptor).st_size
        return self.damaged(
            number, f"was truncated while it was in use: it had {size} bytes, now {now}"
        )

    def _unreadable(self, request: Request, error: OSError) -> DataError:
        attempts = self._reading.attempts
        tried = f" in {attempts} attempts" if attempts > 1 and error.errno in TRANSIENT else ""
        return DataError(
            f"{self.files[request.number].path}: cannot be read any more{tried} "
            f"({error.strerror or error}); make the file readable again as it was, and run the "
            "command again"
        )

    def _announce(self, request: Request, error: OSError, attempt: int) -> None:
        if attempt == 1:
            log.warning(
                "%s: %s; reading it again, up to %d times",
                self.files[request.number].path,
                error.strerror or error,
                self._reading.attempts - 1,
            )

    def _forget_stale(self, failures: Sequence[Failure]) -> None:
        """Closes files whose handle a server no longer knows; the next attempt opens them again."""
        for number in {r.number for r, error in failures if error.errno == errno.ESTALE}:
            if number in self._descriptors:
                os.close(self._descriptors.pop(number))

    def _descriptor(self, number: int) -> int:
        """Returns the open file; raises OSError, and DataError if it was replaced."""
        if number in self._descriptors:
            self._descriptors.move_to_end(number)
            return self._descriptors[number]
        file = self.files[number]
        descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        if Identity.of(descriptor) != file.identity:
            os.close(descriptor)
            raise DataError(
                f"{file.path}: was changed or replaced while it was in use; leave the files of "
                "running commands alone, and run the command again"
            )
        self._descriptors[number] = descriptor
        if len(self._descriptors) > _MOST_OPEN:
            os.close(self._descriptors.popitem(last=False)[1])
        return descriptor
