"""The files in an archive, read at their places without extraction."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from srepa_ds.data.sources.listing import check_unicode, is_image
from srepa_ds.errors import DataError, SourceError, listed

MOST_ENTRY_BYTES = 1 << 30
"""An archive with a larger image is refused."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file in an archive."""

    name: str
    """Its path in the archive, which stays inside any folder that it is joined to."""
    start: int
    """Where it begins: its contents in a tar, its own header in a zip."""
    size: int
    """Bytes of its contents."""
    packed: int | None = None
    """Bytes of its compressed contents; None if they are stored as they are."""
    checksum: int = 0
    """CRC-32 of the contents, in a zip."""


@dataclass(frozen=True)
class Contents:
    """What an archive holds."""

    files: list[Entry]
    folders: frozenset[str]
    """Folders that it lists; it need not list any."""


Reader = Callable[[Path, Entry], bytes]
"""Returns the contents of an entry; raises DataError."""


def refused(archive: object, name: str, reason: str) -> DataError:
    """Returns the error for an archive with an entry that nobody should unpack."""
    return DataError(
        f"{archive}: the entry {name!r} {reason}; the archive is not read, make it again"
    )


def safe_name(archive: object, name: str) -> str:
    """Returns the path of an entry without `./`; raises DataError if it leads out of a folder."""
    if "\\" in name or "\0" in name or re.match(r"[A-Za-z]:", name):
        raise refused(archive, name, "is a path of another system")
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        raise refused(archive, name, "leads out of the archive's folder")
    return "/".join(part for part in parts if part not in ("", "."))


def check_size(archive: object, name: str, size: int) -> None:
    """Checks that an image in an archive may be read into memory; raises DataError."""
    if is_image(name) and size > MOST_ENTRY_BYTES:
        raise refused(archive, name, f"has {size:,} bytes, more than any image")


def check_names(archive: object, files: Iterable[Entry]) -> None:
    """Checks that names are Unicode and that no two files have the same; raises DataError."""
    counts = Counter(entry.name for entry in files)
    check_unicode(archive, counts)
    twins = [repr(name) for name, count in counts.items() if count > 1]
    if twins:
        raise DataError(f"{archive}: holds {listed(twins)} more than once; make the archive again")


def read_at(path: Path, start: int, size: int) -> bytes:
    """Returns `size` bytes of a file, from any thread; raises SourceError if it cannot."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            parts = []
            while size > 0 and (part := os.pread(descriptor, size, start)):
                parts.append(part)
                start, size = start + len(part), size - len(part)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read any more ({error.strerror}); make it readable, and run the "
            "same command again"
        ) from error
    if size > 0:
        raise SourceError(
            f"{path} is shorter than it was when it was listed; restore it, and run the same "
            "command again"
        )
    return b"".join(parts)
