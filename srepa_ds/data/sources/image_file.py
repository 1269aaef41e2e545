"""Reads the file of one image, and tells a broken file from a source that has gone."""

import errno
import os
from pathlib import Path

from srepa_ds.data.sources.entries import MOST_ENTRY_BYTES
from srepa_ds.errors import DataError, SourceError
from srepa_ds.files import reason_of

# Of disks, networks and this process, not of one file.
_OF_THE_SOURCE = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN),
    *(errno.EHOSTUNREACH, errno.ENETDOWN, errno.EREMOTEIO, errno.ENODEV, errno.ENXIO),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
}


def image_file(path: Path, *, root: Path) -> bytes:
    """Returns the contents of an image file below `root`, from any thread.

    Raises DataError for a file that cannot be read or is larger than any image, and SourceError if
    the disk fails or `root` has gone.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MOST_ENTRY_BYTES:
                raise DataError(f"has {size:,} bytes, more than any image")
            return file.read(MOST_ENTRY_BYTES)
    except OSError as error:
        raise read_failure(error, root=root) from error


def read_failure(error: OSError, *, root: Path) -> DataError:
    """Returns the error to raise: a SourceError unless it concerns one file alone."""
    if error.errno in _OF_THE_SOURCE or not root.exists():
        place = error.filename or root
        return SourceError(
            f"{place}: {reason_of(error)}; the source cannot be read any more: make it readable, "
            "and run the same command again"
        )
    return DataError(reason_of(error))
