"""Claims: which process works on which unit of a folder that independent processes share.

A claim is a small file. Its owner touches it while it lives, so a claim that is no longer touched
belongs to a process that is dead, paused or cut off, and another process takes it over. The thread
that touches it may outlive the work of a process that hangs: nobody should wait for a claim without
end. Claims only save work: two processes that do the same unit write the same bytes.
"""

import json
import os
import secrets
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from srepa_ds.distributed.surroundings import seconds_in_environment
from srepa_ds.files import PARTIAL, process_mark, process_space

CLAIM_SECONDS = "SREPA_CLAIM_SECONDS"
"""Names the seconds without a touch after which a claim is stale; 120 by default."""

CLAIM = ".claim"
_CLOCK = ".clock"
_TAKEN = ".taken"
_DEFAULT_SECONDS = 120.0
# A claim is touched so often in the time after which it would be stale.
_TOUCHES = 8
_MOST_BYTES = 1 << 12


def claim_seconds() -> float:
    """Returns the seconds after which a claim is stale.

    Raises TopologyError if `SREPA_CLAIM_SECONDS` is not a positive number.
    """
    return seconds_in_environment(CLAIM_SECONDS, _DEFAULT_SECONDS)


class Process(NamedTuple):
    """A process on one of many machines, told from a later one with the same number."""

    host: str
    space: str
    """The machine's start and the container, in which process numbers have a meaning."""
    pid: int
    start: str
    """When it started, in the machine's own ticks; empty if that is not known."""

    @classmethod
    def own(cls) -> "Process":
        """Returns this process."""
        pid = os.getpid()
        _, start = _state_of(pid)
        return cls(socket.gethostname(), process_space(), pid, start)

    @property
    def name(self) -> str:
        """A name for files of this process."""
        return f"{self.host}-{self.pid}"

    def is_dead(self) -> bool:
        """Returns whether the process has certainly ended; False if it is on another machine."""
        if (self.host, self.space) != (socket.gethostname(), process_space()):
            return False
        if not _is_running(self.pid):
            return True
        state, start = _state_of(self.pid)
        return state in ("Z", "X") or (start != self.start and bool(start and self.start))


def _state_of(pid: int) -> tuple[str, str]:
    """Returns the state and the start of a process, empty where the system does not tell them."""
    try:
        # The name of the program, in brackets, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError, UnicodeDecodeError):
        return "", ""


class _Seen(NamedTuple):
    """A claim as it was found."""

    owner: Process | None
    """None if the file tells no owner."""
    inode: int
    touched_ns: int


class Claims:
    """The claims of this process in a folder; a context manager, which gives them all back.

    A thread touches the claims that are held. All methods raise OSError if the folder cannot be
    written to, and FileNotFoundError if it is gone.
    """

    def __init__(self, folder: Path, *, seconds: float | None = None):
        """`seconds` without a touch make a claim stale; by default `claim_seconds()`."""
        self._folder = folder
        self._seconds = claim_seconds() if seconds is None else seconds
        self._own = Process.own()
        self._text = json.dumps({**self._own._asdict(), "token": secrets.token_hex(8)})
        self._clock = folder / f"{self._own.name}-{secrets.token_hex(4)}{_CLOCK}"
        self._held: set[Path] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._touch_all, daemon=True, name="claims")

    def __enter__(self) -> "Claims":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(self._seconds)
        with suppress(OSError):
            for path in tuple(self._held):
                self._release(path)
            self._clock.unlink(missing_ok=True)

    @property
    def seconds(self) -> float:
        """The seconds without a touch after which a claim is stale."""
        return self._seconds

    @property
    def held(self) -> int:
        """The number of claims that are held."""
        return len(self._held)

    def take(self, name: str) -> bool:
        """Returns whether this process now holds the claim `name`, which it did not before."""
        path = self._folder / (name + CLAIM)
        if path in self._held:
            return False
        if not self._create(path):
            seen = _look(path)
            if seen is None or not self._is_stale(seen):
                return False
            # Seen again, because several may be waiting for it to become stale.
            if _look(path) != seen or not self._clear(path, seen) or not self._create(path):
                return False
        self._held.add(path)
        return True

    def release(self, name: str) -> None:
        """Gives the claim `name` back, unless another process has taken it over."""
        self._release(self._folder / (name + CLAIM))

    def _release(self, path: Path) -> None:
        self._held.discard(path)
        if self._is_own(path):
            path.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, self._text.encode())
        finally:
            os.close(descriptor)
        return True

    def _is_own(self, path: Path) -> bool:
        try:
            return path.read_bytes() == self._text.encode()
        except OSError:
            return False

    def _is_stale(self, seen: _Seen) -> bool:
        if seen.owner is not None and seen.owner.is_dead():
            return True
        return self._now_ns() - seen.touched_ns > self._seconds * 1e9

    def _now_ns(self) -> int:
        """Returns the time by the clock that dates the claims; it may not be this machine's."""
        self._clock.touch()
        return self._clock.stat().st_mtime_ns

    def _clear(self, path: Path, seen: _Seen) -> bool:
        """Returns whether this process, of all that have `seen` the stale claim, removed it."""
        aside = path.with_name(f"{path.name}.{self._clock.stem}{_TAKEN}")
        try:
            # Of several processes, one finds the file.
            os.rename(path, aside)
        except FileNotFoundError:
            self._folder.stat()
            return False
        found = aside.stat()
        is_the_same = (found.st_ino, found.st_mtime_ns) == (seen.inode, seen.touched_ns)
        if not is_the_same:
            # The new claim of a process that was faster.
            with suppress(OSError):
                os.link(aside, path)
        aside.unlink(missing_ok=True)
        return is_the_same

    def _touch_all(self) -> None:
        while not self._ended.wait(self._seconds / _TOUCHES):
            for path in tuple(self._held):
                if self._is_own(path):
                    # Without a time: the file server's clock gives it.
                    with suppress(OSError):
                        os.utime(path)


def is_left_over(path: Path, *, after_seconds: float) -> bool:
    """Returns whether no living process writes `path`, a file of `write_aside(concurrent=True)`.

    That is certain if its process was in this container and has ended; of others, one that did not
    grow for so long. The folder must be writable: its own clock tells the time. Raises OSError.
    """
    place, _, pid = path.name.removesuffix(PARTIAL).rpartition("-")
    if place.endswith(f".{process_mark().rpartition('-')[0]}") and pid.isdecimal():
        return not _is_running(int(pid))
    clock = path.with_name(f"{path.name}{_CLOCK}")
    try:
        clock.touch()
        return clock.stat().st_mtime - path.stat().st_mtime > after_seconds
    except FileNotFoundError:
        return False
    finally:
        clock.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _look(path: Path) -> _Seen | None:
    """Returns the claim in a file, None if there is none.

    Opened, not only looked up: network file systems remember for a while what a name had.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            text = file.read(_MOST_BYTES)
    except FileNotFoundError:
        return None
    return _Seen(_owner_in(text), found.st_ino, found.st_mtime_ns)


def _owner_in(text: bytes) -> Process | None:
    try:
        fields = json.loads(text)
        host, space, pid, start = (fields[name] for name in Process._fields)
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0:
        return None
    return Process(str(host), str(space), pid, str(start))
