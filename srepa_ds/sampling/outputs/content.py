"""The images of a whole set, read in the order of their indices, a block at a time."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from numpy import ndarray

from srepa_ds.sampling.generate import Chunk
from srepa_ds.sampling.parts import Parts
from srepa_ds.sampling.provenance import Provenance

Block = UInt8[ndarray, "block height width 3"]


class Content(ABC):
    """The images and labels of a set, wherever they are stored."""

    @property
    @abstractmethod
    def labels(self) -> Int64[ndarray, " samples"]:
        """The label of each image."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""

    @abstractmethod
    def blocks(self) -> Iterator[Block]:
        """Yields all images, as consecutive blocks."""


@dataclass(frozen=True)
class SetFacts:
    """What outputs tell of a set beside its images and labels."""

    provenance: Provenance
    num_classes: int


class Output(ABC):
    """A form in which a set is stored, beside its provenance; a row of `OUTPUTS`."""

    name: str
    """Its name in the set's folder."""

    @abstractmethod
    def is_there(self, folder: Path) -> bool:
        """Returns whether the set in `folder` has this output, whole."""

    @abstractmethod
    def bytes_of(self, num_values: int) -> int:
        """Returns about how much room it takes for so many pixels and channels."""

    @abstractmethod
    def write(self, folder: Path, content: Content, facts: SetFacts) -> None:
        """Writes the output whole, or goes on where a killed process was.

        Only one process calls it at a time. Raises OSError and OutputError.
        """

    @abstractmethod
    def tidy_up(self, folder: Path) -> None:
        """Removes what a kill at the last moment left of writing; raises OSError and DataError."""

    @abstractmethod
    def read(self, folder: Path) -> Content:
        """Returns the set; raises DataError if it is damaged."""


class PartsContent(Content):
    """The content of a set all of whose parts are there."""

    def __init__(self, parts: Parts, chunks: Sequence[Chunk]):
        """`chunks` are those of the whole set, in their order."""
        self._parts = parts
        self._chunks = chunks

    @cached_property
    def labels(self) -> Int64[ndarray, " samples"]:
        """The label of each image; raises OSError or SafetensorError."""
        return torch.cat([self._parts.read(chunk, "labels") for chunk in self._chunks]).numpy()

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels; raises OSError or SafetensorError."""
        height, width, channels = self._parts.read(self._chunks[0], "images").shape[1:]
        return height, width, channels

    def blocks(self) -> Iterator[Block]:
        """Yields the images of each chunk; raises OSError or SafetensorError."""
        for chunk in self._chunks:
            yield self._parts.read(chunk, "images").numpy()


def regrouped(blocks: Iterator[Block], rows: int) -> Iterator[Block]:
    """Yields the rows of `blocks` in groups of `rows`, of which the last may be smaller."""
    waiting: list[ndarray] = []
    count = 0
    for block in blocks:
        while len(block):
            piece, block = block[: rows - count], block[rows - count :]
            waiting.append(piece)
            count += len(piece)
            if count == rows:
                group = np.concatenate(waiting)
                # Before the group is worked on: the pieces are as large.
                waiting, count = [], 0
                yield group
    if waiting:
        yield np.concatenate(waiting)
