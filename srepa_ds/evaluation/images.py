"""`ImageSet`: images to be scored, or to be compared with, of any form; read block by block."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Int64, UInt8
from torch import Tensor


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
        """What tells this set from others, as plain JSON values."""

    def blocks(self, size: int, stripe: Stripe = WHOLE) -> Iterator[ImageBlock]:
        """Yields the blocks of `size` images that belong to `stripe`, in order.

        Raises DataError for images that cannot be read.
        """
