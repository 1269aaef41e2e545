"""Where images come from before preparation: one row of `SOURCES` per kind."""

from dataclasses import dataclass
from typing import Annotated, Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor

from srepa_ds.errors import DataError
from srepa_ds.noise import Stream, bits
from srepa_ds.schema import Section, known_in

# No epoch has this number, so the split shares no draw with the order of training.
_SPLIT_DRAW = (1 << 24) - 1


@dataclass(frozen=True)
class SourceItem:
    """One image as the source holds it."""

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
        """The label of every image, without decoding one."""

    def item(self, index: int) -> SourceItem:
        """Returns one image; raises DataError if it cannot be decoded."""


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey values that come inside the library."""

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError(
                "the source 'digits' needs scikit-learn; install the extra: "
                "pip install 'srepa_ds[demo]'"
            ) from error
        digits: Any = load_digits()
        self._pixels = np.round(digits.images * (255.0 / 16.0)).astype(np.uint8)
        self.labels = torch.from_numpy(digits.target.astype(np.int64))
        self.class_names = tuple(str(name) for name in digits.target_names)

    def item(self, index: int) -> SourceItem:
        """Returns one digit as an 8 x 8 grey image."""
        image = Image.fromarray(self._pixels[index])
        return SourceItem(image, int(self.labels[index]), f"digit-{index:04d}")


SOURCES: dict[str, type[Source]] = {"digits": Digits}


class SourceConfig(Section):
    """Where the images come from."""

    kind: Annotated[str, known_in("source", SOURCES)]
    """`digits`: scikit-learn's handwritten digits."""


def build_source(config: SourceConfig) -> Source:
    """Returns the opened source; raises DataError if it is not there."""
    return SOURCES[config.kind]()


@dataclass(frozen=True)
class Split:
    """Indices of a source, each in rising order, no index in both."""

    train: Int64[Tensor, " train"]
    heldout: Int64[Tensor, " heldout"]


def stratified_split(
    labels: Int64[Tensor, " samples"], *, holdout_fraction: float, seed: int
) -> Split:
    """Returns a split that holds out the same fraction of every class.

    Of a class with n samples, round(n x fraction) are held out, the first in an order that is a
    function of seed and sample index alone.
    """
    keys = bits(seed, Stream.DATA_ORDER, torch.arange(len(labels)), 1, draw=_SPLIT_DRAW)[:, 0]
    is_heldout = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        shuffled = members[keys[members].argsort(stable=True)]
        is_heldout[shuffled[: round(len(members) * holdout_fraction)]] = True
    return Split(train=(~is_heldout).nonzero()[:, 0], heldout=is_heldout.nonzero()[:, 0])
