"""Reads images from an archive as ADM's evaluator does: `arr_0`, and labels in `arr_1`."""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from numpy import ndarray

from srepa_ds.data.sources.listing import MOST_CLASSES
from srepa_ds.documents.npz_reader import NpzArchive
from srepa_ds.errors import DataError
from srepa_ds.files import looked_for, reason_of

log = logging.getLogger("srepa_ds")

IMAGES, LABELS = "arr_0", "arr_1"
_CURE = f"give an .npz with {IMAGES} as ADM's evaluator reads it"


class ImageArchive:
    """The images of an archive, which are read in blocks, and their labels if it has any."""

    def __init__(self, path: Path, *, cure: str = _CURE):
        """Reads headers and labels; what `arr_1` holds beside a list of whole numbers is ignored.

        Raises DataError, which ends with `cure`, for a file that is missing or damaged, or that
        holds something else.
        """
        self.path = path
        self._cure = cure
        try:
            with NpzArchive(path) as archive:
                self.shape = _shape_of_images(archive)
                self.labels: Int64[ndarray, " samples"] | None = _labels(archive, self.shape[0])
                self._checksums = archive.checksums
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def contents(self) -> str:
        """A hash of the arrays' checksums, in 16 digits.

        The archive's table holds a checksum of each array, so no image is read for it.
        """
        return hashlib.sha256(repr(sorted(self._checksums.items())).encode()).hexdigest()[:16]

    def blocks(self, size: int) -> Iterator[UInt8[ndarray, "batch height width 3"]]:
        """Yields the images in blocks of `size`; raises DataError if they are damaged."""
        try:
            with NpzArchive(self.path) as archive:
                yield from archive.blocks(IMAGES, size)
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(
            f"{self.path}: cannot be read as images ({reason_of(error)}){looked_for(self.path)}; "
            f"{self._cure}"
        )


def _shape_of_images(archive: NpzArchive) -> tuple[int, int, int, int]:
    array = archive.arrays.get(IMAGES)
    if array is None:
        names = ", ".join(sorted(archive.arrays)) or "nothing"
        raise ValueError(f"it holds {names}, and images should be in {IMAGES}")
    if array.dtype != np.uint8 or len(array.shape) != 4 or array.shape[3] != 3:
        raise ValueError(
            f"{IMAGES} is {array.dtype} of shape {array.shape}, and images are uint8 of shape "
            "(n, height, width, 3)"
        )
    count, height, width, channels = array.shape
    if not count:
        raise ValueError("it holds no images")
    return count, height, width, channels


def _labels(archive: NpzArchive, count: int) -> Int64[ndarray, " samples"] | None:
    found = archive.arrays.get(LABELS)
    if found is None:
        return None
    if len(found.shape) != 1 or found.dtype.kind not in "iu":
        # ADM's evaluator looks at the images alone.
        log.info(
            "%s: %s is %s of shape %s and no list of whole numbers; the images count as unlabelled",
            *(archive.path, LABELS, found.dtype, found.shape),
        )
        return None
    return checked_labels(archive.read(LABELS), count)


def checked_labels(labels: ndarray, count: int) -> Int64[ndarray, " samples"]:
    """Returns labels of `count` images; raises ValueError for others than the numbers of classes.

    They are from 0 to 999,999: room is made for every class up to the greatest.
    """
    if len(labels) != count:
        raise ValueError(f"it holds {len(labels)} labels for {count} images")
    for label in (labels.min(), labels.max()):
        if not 0 <= label < MOST_CLASSES:
            raise ValueError(f"the label {label} is not from 0 to {MOST_CLASSES - 1:,}")
    return labels.astype(np.int64)
