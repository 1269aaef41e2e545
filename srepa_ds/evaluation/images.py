"""`ImageSet`: images to be scored, or to be compared with, of any form; read block by block.

`StoredImages` is what the forms in which images are stored have in common.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from srepa_ds.weight_file import hash_of_tensors


class ImageBlock(NamedTuple):
    """Some images of a set, with their places in it and, where it has any, their labels."""

    images: UInt8[Tensor, "batch 3 height width"]
    labels: Int64[Tensor, " batch"] | None
    sample_ids: Int64[Tensor, " batch"]


@dataclass(frozen=True)
class Stripe:
    """The blocks that one rank reads: `first`, `first + every`, ..."""

    first: int = 0
    every: int = 1

    def has(self, block: int) -> bool:
        """Returns whether the block of that number belongs to it."""
        return block % self.every == self.first


WHOLE = Stripe()


@runtime_checkable
class ImageSet(Protocol):
    """Images of one size, in a fixed order."""

    def __len__(self) -> int:
        """Returns the number of images."""

    @property
    def where(self) -> str:
        """The place of the set, for messages."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this set from others by its contents, as plain JSON values.

        Raises DataError for images that cannot be read.
        """

    def chosen(self, indices: Int64[Tensor, " images"]) -> "ImageSet":
        """Returns the set of some of the images, numbered anew; `indices` ascend."""

    def blocks(self, size: int, stripe: Stripe = WHOLE) -> Iterator[ImageBlock]:
        """Yields the blocks of `size` images that belong to `stripe`, in order.

        Raises DataError for images that cannot be read.
        """


class StoredImages(ABC):
    """Images that are stored in files, all of them or some that were chosen."""

    def __init__(self, count: int):
        """Takes all of `count` images."""
        self._count = count
        self._indices = torch.arange(count)

    def __len__(self) -> int:
        return len(self._indices)

    @property
    @abstractmethod
    def where(self) -> str:
        """The place of the set, for messages."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""

    @property
    @abstractmethod
    def _contents(self) -> dict[str, Any]:
        """What tells all of the images from others."""

    @abstractmethod
    def _blocks(self, size: int, stripe: Stripe) -> Iterator[tuple[Tensor, Tensor | None, int]]:
        """Yields images, labels and the number of the first for each block of `stripe`."""

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this set from others by its contents; raises DataError."""
        if self._takes_all:
            return self._contents
        return {**self._contents, "chosen": hash_of_tensors({"indices": self._indices})}

    def chosen(self, indices: Int64[Tensor, " images"]) -> "StoredImages":
        """Returns the set of some of the images, numbered anew; `indices` ascend."""
        other = copy.copy(self)
        other._indices = self._indices[indices]
        return other

    def blocks(self, size: int, stripe: Stripe = WHOLE) -> Iterator[ImageBlock]:
        """Yields the blocks of `size` images that belong to `stripe`, in order.

        Raises DataError for images that cannot be read, or that differ in size.
        """
        for images, labels, start in self._blocks(size, stripe):
            yield ImageBlock(images, labels, torch.arange(start, start + len(images)))

    @property
    def _takes_all(self) -> bool:
        return len(self._indices) == self._count

    def _groups(self, size: int, stripe: Stripe) -> Iterator[tuple[Tensor, int]]:
        """Yields the indices of each block of `stripe`, and the number of its first image."""
        for number, indices in enumerate(self._indices.split(size)):
            if stripe.has(number):
                yield indices, number * size
