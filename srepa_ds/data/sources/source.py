"""The `Source` protocol: a labelled collection of images in a fixed order."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Int64
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class SourceItem:
    """One image of a source, with its label and its name."""

    image: Image.Image
    label: int
    name: str


@runtime_checkable
class Source(Protocol):
    """A labelled collection of images in a fixed order."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label."""

    @property
    def labels(self) -> Int64[Tensor, " samples"]:
        """The label of every image, known without decoding images."""

    def item(self, index: int) -> SourceItem:
        """Returns one image; raises DataError if it cannot be decoded."""
