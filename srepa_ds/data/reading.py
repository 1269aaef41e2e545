"""Settings for reading files: the number of parallel reads, and of attempts after an error."""

import errno
import os
from pathlib import Path
from typing import NamedTuple

_MOUNTS = Path("/proc/self/mounts")
_THREADS_ON_NETWORK = 8
_NETWORK = frozenset(
    "9p afs beegfs ceph cifs fhgfs fuse glusterfs gpfs lustre ncpfs nfs nfs4 orangefs panfs pvfs2 "
    "smb3 smbfs virtiofs wekafs".split()
)

TRANSIENT = frozenset((errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN))
"""Errors of network disks after which the same read may succeed."""


class Reading(NamedTuple):
    """The way one process reads the files of a data set."""

    threads: int = 1
    """Reads under way at once."""
    attempts: int = 3
    """Attempts at a read that ends in one of the `TRANSIENT` errors."""


DEFAULT_READING = Reading()


def default_threads(folder: Path) -> int:
    """Returns how many reads at once suit the disk of `folder`.

    A local disk answers before another thread could ask; over a network each read waits.
    """
    return _THREADS_ON_NETWORK if is_network(file_system_of(folder)) else 1


def is_network(file_system: str) -> bool:
    """Returns whether a type of file system reads over a network; FUSE's count as such."""
    return file_system in _NETWORK or file_system.startswith("fuse.")


def file_system_of(folder: Path, mounts: Path = _MOUNTS) -> str:
    """Returns the type of the file system of `folder`, "" if the system does not tell."""
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    real, longest, found = Path(os.path.realpath(folder)), -1, ""
    for line in lines:
        _, place, kind, *_ = line.split(" ")
        point = Path(_unescaped(place))
        # Of two mounts at one place, the later one hides the earlier.
        if real.is_relative_to(point) and len(point.parts) >= longest:
            longest, found = len(point.parts), kind
    return found


def _unescaped(place: str) -> str:
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        place = place.replace(octal, character)
    return place
