"""Files that are either whole or not there."""

import fcntl
import hashlib
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import srepa_ds

PARTIAL = ".partial"


def write_aside(path: Path, write: Callable[[Path], object], *, concurrent: bool = False) -> None:
    """Returns when `path` holds what `write` put into the file it was given, all of it.

    The work happens in `<path>.partial`, which is flushed to disk and renamed; it is removed if
    `write` raises. With `concurrent` several processes may write the same file at once. Raises what
    `write` raises, and OSError.
    """
    process = f".{socket.gethostname()}-{os.getpid()}" if concurrent else ""
    aside = path.with_name(path.name + process + PARTIAL)
    try:
        aside.touch()
        # safetensors makes its files private; a data set has the permissions of its neighbours.
        mode = stat.S_IMODE(aside.stat().st_mode)
        write(aside)
        aside.chmod(mode)
        flush_to_disk(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def shipped(path: Path) -> Path:
    """Returns `path` if it exists, else the file of that name shipped with the package."""
    if path.exists() or path.is_absolute():
        return path
    return shipped_with_package(path) or path


def shipped_with_package(path: Path) -> Path | None:
    """Returns the file of that name shipped with the package, if there is one."""
    return next((root / path for root in _shipping_roots() if (root / path).exists()), None)


def _shipping_roots() -> Iterator[Path]:
    """Yields where the shipped folders may lie: in a checkout, or where pip put them."""
    beside_package = Path(srepa_ds.__file__).parents[1]
    yield beside_package
    try:
        installed = metadata.files("srepa_ds") or ()
    except metadata.PackageNotFoundError:
        installed = ()
    for file in installed:
        if file.parts[-4:] == ("share", "srepa_ds", "constraints", "tested.txt"):
            yield Path(str(file.locate())).resolve().parents[1]
    # `pip install --target` moves them after it has noted where they are.
    yield beside_package / "share" / "srepa_ds"


def flush_to_disk(path: Path) -> None:
    """Returns when the contents of `path` are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Returns the sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes that ask likewise out of `folder` while the block runs.

    The folder itself is the lock: there is no file to leave behind, and it is free as soon as the
    process has ended in whatever way. Raises BlockingIOError if another process has it, OSError if
    there is no such folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            # Some network file systems know no locks; then nothing is lost but this protection.
            pass
        yield
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> list[Path]:
    """Returns the folders that had to be made so that `folder` is there, innermost first.

    Raises OSError, having removed what it made.
    """
    made: list[Path] = []
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            made.insert(0, path)
    except OSError:
        remove_empty(made)
        raise
    return made


def remove_empty(folders: list[Path]) -> None:
    """Removes `folders` in their order, up to the first that is not empty."""
    for path in folders:
        try:
            path.rmdir()
        except OSError:
            # Someone else put something there meanwhile; it is theirs.
            return


log = logging.getLogger("srepa_ds")


@contextmanager
def despite_full_disk(name: str) -> Iterator[None]:
    """Makes a warning of an OSError met in the block.

    A run is worth more than what it says of itself; its next checkpoint says more clearly what is
    wrong with the disk.
    """
    try:
        yield
    except OSError as error:
        log.warning("cannot write %s: %s", name, error.strerror or error)
