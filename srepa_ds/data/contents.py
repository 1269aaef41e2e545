"""Compares the contents of files with the hashes that their index gives.

All contents of a large data set cannot be read before the first step, so `ContentCheck` reads them
in the background, each file once until it changes.
"""

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from srepa_ds.data.stored_files import Identity
from srepa_ds.documents.json_reader import read_json
from srepa_ds.errors import DataError
from srepa_ds.files import write_aside

CHECKED_NAME = ".checked.json"
"""The file beside the data that remembers which contents were compared."""

_SMALL = 256 << 20
_CHUNK = 8 << 20
_SECONDS_TO_END = 5.0
_SECONDS_BETWEEN_NOTES = 10.0
_LOWEST_PRIORITY = 19

log = logging.getLogger("srepa_ds")


class IndexedFile(NamedTuple):
    """A file, and what the index says of its contents."""

    path: Path
    num_bytes: int
    sha256: str
    """In hexadecimal."""
    again: str
    """The cure for a damaged file, for messages."""


class Damage(NamedTuple):
    """A file with other contents than its index says."""

    path: Path
    message: str


def check_contents(file: IndexedFile) -> None:
    """Reads a whole file and compares its hash; raises DataError if it differs."""
    try:
        found = _sha256_of(file.path)
    except OSError as error:
        raise DataError(f"{file.path}: {error.strerror or error}; make it readable") from error
    if found != file.sha256:
        raise DataError(_differs(file, found))


def are_small(files: Iterable[IndexedFile]) -> bool:
    """Returns whether the files are compared in a moment: 256 MiB, 0.2 s at 1.5 GB/s."""
    return sum(file.num_bytes for file in files) < _SMALL


def _differs(file: IndexedFile, found: str | None) -> str:
    return (
        f"{file.path}: contents changed since it was written (sha256 {found}, expected "
        f"{file.sha256}); {file.again}"
    )


def _sha256_of(path: Path, go_on: Callable[[], bool] = lambda: True) -> str | None:
    """Returns the hash of a file, or None if `go_on` says to stop; raises OSError."""
    digest, room = hashlib.sha256(), bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        # Both calls let other threads run in the meantime.
        while size := file.readinto(room):
            digest.update(memoryview(room)[:size])
            if not go_on():
                return None
    return digest.hexdigest()


class ContentCheck:
    """A thread that compares files with their index while something else uses them.

    A file is compared once: `remembered_in`, a file beside the data, keeps which one had which
    hash. Where it cannot be written, the next start compares all files again. Run one per machine.
    """

    def __init__(self, files: Sequence[IndexedFile], *, remembered_in: Path):
        self._files = tuple(files)
        self._place = remembered_in
        self._known = _remembered(remembered_in)
        self._remembered_at = time.monotonic()
        self._has_news = False
        self._num_done = 0
        self._failure: Damage | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="content check", daemon=True)

    def start(self) -> None:
        """Begins to read the files."""
        self._thread.start()

    def failure(self) -> Damage | None:
        """Returns the first damaged file found so far, at once."""
        return self._failure

    def is_finished(self) -> bool:
        """Returns whether all files were compared."""
        return self._num_done == len(self._files)

    def wait(self) -> Damage | None:
        """Waits until all files were compared, or one is damaged; returns the damaged one."""
        self._thread.join()
        return self._failure

    def close(self) -> None:
        """Ends the thread, and says if files are left to compare."""
        self._ended.set()
        if self._thread.ident is None:
            return
        # Where the disk hangs, so does the thread.
        self._thread.join(_SECONDS_TO_END)
        if self._failure is None and not self.is_finished():
            log.info(
                "compared the contents of %d of %d data files with their index; `srepa-ds verify` "
                "compares all of them",
                self._num_done,
                len(self._files),
            )

    def _run(self) -> None:
        with suppress(OSError):
            # On Linux a thread has its own priority.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        self._compare_all()
        self._remember()

    def _compare_all(self) -> None:
        for file in self._files:
            if self._ended.is_set():
                return
            try:
                found = self._hash_of(file)
            except OSError as error:
                # Whoever needs the file meets the same error. A removed one may still be open.
                log.warning("cannot check %s: %s", file.path, error.strerror or error)
                continue
            if found is None:
                return
            if found != file.sha256:
                self._failure = Damage(file.path, _differs(file, found))
                return
            self._num_done += 1

    def _hash_of(self, file: IndexedFile) -> str | None:
        """Returns the hash of a file, read or remembered; None if the check was closed."""
        key, identity = os.path.relpath(file.path, self._place.parent), Identity.of(file.path)
        # Without the device: its number may change when a disk is mounted again.
        mark = [identity.inode, identity.size, identity.modified]
        if self._known.get(key) == [*mark, file.sha256]:
            return file.sha256
        found = _sha256_of(file.path, lambda: not self._ended.is_set())
        if found is not None and found == file.sha256 and Identity.of(file.path) == identity:
            self._known[key] = [*mark, found]
            self._has_news = True
            if time.monotonic() - self._remembered_at > _SECONDS_BETWEEN_NOTES:
                self._remember()
        return found

    def _remember(self) -> None:
        if not self._has_news:
            return
        self._has_news, self._remembered_at = False, time.monotonic()
        # Other machines may check the same files.
        known = {**_remembered(self._place), **self._known}
        text = json.dumps(known, indent=0, sort_keys=True) + "\n"
        with suppress(OSError):
            write_aside(self._place, lambda aside: aside.write_text(text), concurrent=True)


def _remembered(path: Path) -> dict[str, Any]:
    """Returns the facts of the files compared earlier; none if they cannot be read."""
    try:
        known = read_json(path)
    except (OSError, ValueError):
        return {}
    # Whatever else stands there equals no facts of a file.
    return known if isinstance(known, dict) else {}
