"""`samples.npz`, as ADM's evaluator reads it: arr_0 uint8 NHWC, arr_1 the labels."""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from srepa_ds.errors import DataError
from srepa_ds.files import reason_of, write_aside
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

    def tidy_up(self, folder: Path) -> None:
        """Leaves everything as it is: the archive gets its name last."""

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
            raise self._damaged(ValueError("it holds no labels"))
        return labels

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels; raises DataError."""
        with self._images() as (_, shape):
            return shape

    def blocks(self) -> Iterator[Block]:
        """Yields the images, 16 MiB at a time; raises DataError."""
        left = len(self.labels)
        with self._images() as (file, shape):
            rows = max(1, _BLOCK_BYTES // math.prod(shape))
            while left:
                count = min(rows, left)
                content = file.read(count * math.prod(shape))
                yield np.frombuffer(content, dtype=np.uint8).reshape(count, *shape)
                left -= count

    @contextmanager
    def _images(self) -> Iterator[tuple[IO[bytes], tuple[int, int, int]]]:
        """Opens the array of the images, and yields it with their shape; raises DataError."""
        count = len(self.labels)
        try:
            with zipfile.ZipFile(self._folder / SAMPLES) as archive, archive.open(_IMAGES) as file:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                if dtype != np.uint8 or len(shape) != 4 or shape[0] != count or shape[3] != 3:
                    raise ValueError(f"its images are {dtype}{list(shape)}")
                yield file, (shape[1], shape[2], shape[3])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> DataError:
        return DataError(
            f"{self._folder / SAMPLES}: {reason_of(error)}; remove it and run the same command to "
            "make it again"
        )
