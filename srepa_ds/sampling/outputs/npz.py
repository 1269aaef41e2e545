"""`samples.npz`, as ADM's evaluator reads it: arr_0 uint8 NHWC, arr_1 the labels."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from srepa_ds.errors import DataError
from srepa_ds.files import write_aside
from srepa_ds.sampling.image_archive import ImageArchive
from srepa_ds.sampling.npz import NpzMember, write_npz
from srepa_ds.sampling.outputs.content import Block, Content, Output, SetFacts
from srepa_ds.sampling.sample_set import SAMPLES

_BLOCK_BYTES = 16 << 20


class NpzOutput(Output):
    """The archive; written block by block."""

    name = SAMPLES

    def is_there(self, folder: Path) -> bool:
        """Returns whether the archive is there; it gets its name when it is whole."""
        return (folder / SAMPLES).is_file()

    def bytes_of(self, num_values: int) -> int:
        """Returns the room that it takes."""
        return num_values

    def write(self, folder: Path, content: Content, facts: SetFacts) -> None:
        """Writes the archive; raises OSError."""
        labels = np.ascontiguousarray(content.labels, dtype=np.int64)
        shape = (len(labels), *content.image_shape)

        def write(aside: Path) -> None:
            members = (
                NpzMember("arr_0", shape, np.dtype(np.uint8), content.blocks()),
                NpzMember("arr_1", (len(labels),), np.dtype(np.int64), iter([labels])),
            )
            write_npz(aside, members)

        # Where locks do not work, another process may be writing the same.
        write_aside(folder / SAMPLES, write, concurrent=True)

    def tidy_up(self, folder: Path) -> None:
        """Leaves everything as it is: the archive gets its name last."""

    def read(self, folder: Path) -> Content:
        """Returns the set in the archive; raises DataError if it is damaged."""
        return NpzContent(folder)


class NpzContent(Content):
    """The set in an archive that `NpzOutput` wrote."""

    def __init__(self, folder: Path):
        """Reads headers and labels; raises DataError."""
        cure = "remove it and run the same command to make it again"
        self._archive = ImageArchive(folder / SAMPLES, cure=cure)
        if self._archive.labels is None:
            raise DataError(f"{folder / SAMPLES}: holds no labels; {cure}")
        self._labels = self._archive.labels

    @property
    def labels(self) -> Int64[ndarray, " samples"]:
        """The label of each image."""
        return self._labels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        _, height, width, channels = self._archive.shape
        return height, width, channels

    def blocks(self) -> Iterator[Block]:
        """Yields the images, 16 MiB at a time; raises DataError."""
        yield from self._archive.blocks(max(1, _BLOCK_BYTES // math.prod(self.image_shape)))
