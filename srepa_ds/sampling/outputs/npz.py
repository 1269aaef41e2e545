"""`samples.npz`, as ADM's evaluator reads it: arr_0 uint8 NHWC, arr_1 the labels."""

import math
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from srepa_ds.errors import DataError
from srepa_ds.files import write_aside
from srepa_ds.sampling.npz import NpzMember, write_npz
from srepa_ds.sampling.outputs.content import Block, Content, Output, SetFacts
from srepa_ds.sampling.sample_set import SAMPLES, read_labels

_IMAGES = "arr_0.npy"
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

    def read(self, folder: Path) -> Content:
        """Returns the set in the archive; raises DataError if it is damaged."""
        return NpzContent(folder)


class NpzContent(Content):
    """The set in an archive that `NpzOutput` wrote."""

    def __init__(self, folder: Path):
        self._folder = folder

    @cached_property
    def labels(self) -> Int64[ndarray, " samples"]:
        """The label of each image; raises DataError."""
        labels = read_labels(self._folder)
        if labels is None:
            raise self._damaged("it holds no labels")
        return labels

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels; raises DataError."""
        with zipfile.ZipFile(self._folder / SAMPLES) as archive, archive.open(_IMAGES) as file:
            return self._shape_in(file)

    def blocks(self) -> Iterator[Block]:
        """Yields the images, 16 MiB at a time; raises DataError."""
        shape, left = self.image_shape, len(self.labels)
        rows = max(1, _BLOCK_BYTES // math.prod(shape))
        with zipfile.ZipFile(self._folder / SAMPLES) as archive, archive.open(_IMAGES) as file:
            self._shape_in(file)
            while left:
                count = min(rows, left)
                content = file.read(count * math.prod(shape))
                if len(content) != count * math.prod(shape):
                    raise self._damaged("it ends too early")
                yield np.frombuffer(content, dtype=np.uint8).reshape(count, *shape)
                left -= count

    def _shape_in(self, file: object) -> tuple[int, int, int]:
        version = np.lib.format.read_magic(file)  # type: ignore[arg-type]
        if version != (1, 0):
            raise self._damaged("another program wrote it")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)  # type: ignore[arg-type]
        if dtype != np.uint8 or len(shape) != 4 or shape[0] != len(self.labels) or shape[3] != 3:
            raise self._damaged(f"its images are {dtype}{list(shape)}")
        return shape[1], shape[2], shape[3]

    def _damaged(self, reason: str) -> DataError:
        return DataError(
            f"{self._folder / SAMPLES}: {reason}; remove it and run the same command to make it "
            "again"
        )
