"""`png`: a folder of images named by their indices, with their labels and provenance."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from numpy import ndarray
from PIL import Image

from srepa_ds.data.pixels import BYTES_PER_VALUE, PIXEL_ENCODERS
from srepa_ds.errors import DataError
from srepa_ds.files import PARTIAL, reason_of, write_aside
from srepa_ds.sampling.outputs.content import Block, Content, Output, SetFacts
from srepa_ds.sampling.sample_set import PROVENANCE

PNG = "png"
LABELS = "labels.txt"
"""The class of each image, one number per line."""

# The end of every PNG file: the length, name and checksum of its last block.
_END = bytes.fromhex("0000000049454e44ae426082")
_MOST_THREADS = 8
_ROWS = 64


class PngOutput(Output):
    """The folder; it has another name until it is whole, and then goes on from what is there."""

    name = PNG

    def is_there(self, folder: Path) -> bool:
        """Returns whether the folder is there; it gets its name when it is whole."""
        return (folder / PNG).is_dir()

    def bytes_of(self, num_values: int) -> int:
        """Returns about the room that it takes."""
        return int(num_values * BYTES_PER_VALUE["png"])

    def write(self, folder: Path, content: Content, facts: SetFacts) -> None:
        """Writes the images that are missing; raises OSError."""
        aside = folder / (PNG + PARTIAL)
        aside.mkdir(exist_ok=True)
        start = 0
        with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
            for block in content.blocks():
                places = [aside / _name(start + row) for row in range(len(block))]
                list(pool.map(_write_image, places, block))
                start += len(block)
        labels = "".join(f"{label}\n" for label in content.labels.tolist())
        _write(aside / LABELS, labels.encode())
        _write(aside / PROVENANCE, facts.provenance.text().encode())
        # Once for all: to wait for each of 50,000 files would take longer than to write them.
        os.sync()
        os.replace(aside, folder / PNG)

    def tidy_up(self, folder: Path) -> None:
        """Leaves everything as it is: the folder gets its name last."""

    def read(self, folder: Path) -> Content:
        """Returns the set in the folder; raises DataError if it is damaged."""
        return PngContent(folder / PNG)


class PngContent(Content):
    """The set in a folder that `PngOutput` wrote."""

    def __init__(self, folder: Path):
        self._folder = folder

    @cached_property
    def labels(self) -> Int64[ndarray, " samples"]:
        """The label of each image; raises DataError."""
        try:
            lines = (self._folder / LABELS).read_text().split()
            return np.array([int(line) for line in lines], dtype=np.int64)
        except (OSError, ValueError) as error:
            raise _damaged(self._folder / LABELS, error) from error

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels; raises DataError."""
        height, width, channels = self._image(0).shape
        return height, width, channels

    def blocks(self) -> Iterator[Block]:
        """Yields the images, a few at a time; raises DataError."""
        count = len(self.labels)
        for start in range(0, count, _ROWS):
            images = [self._image(number) for number in range(start, min(start + _ROWS, count))]
            if len({image.shape for image in images} | {self.image_shape}) > 1:
                raise _damaged(self._folder, ValueError("its images differ in size"))
            yield np.stack(images)

    def _image(self, number: int) -> UInt8[ndarray, "height width 3"]:
        path = self._folder / _name(number)
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
        # The decoder has many errors for damage; among them are SyntaxError and struct.error.
        except Exception as error:
            raise _damaged(path, error) from error


def _name(number: int) -> str:
    return f"{number:06d}.png"


def _write_image(path: Path, pixels: UInt8[ndarray, "height width 3"]) -> None:
    """Writes an image unless it is there, whole; a kill may leave a beginning, under its name."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_END), os.SEEK_END)
            if file.read() == _END:
                return
    except OSError:
        pass
    path.write_bytes(PIXEL_ENCODERS["png"](pixels))


def _write(path: Path, content: bytes) -> None:
    write_aside(path, lambda aside: aside.write_bytes(content))


def _damaged(path: Path, error: Exception) -> DataError:
    reason = reason_of(error) or type(error).__name__
    return DataError(
        f"{path}: {reason}; remove the folder `{PNG}` and run the same command to make it again"
    )
