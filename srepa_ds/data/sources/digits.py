"""The source `digits`: scikit-learn's handwritten digits."""

import hashlib
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from srepa_ds.data.sources.source import SourceItem
from srepa_ds.errors import DataError
from srepa_ds.schema import Section


class DigitsConfig(Section):
    """scikit-learn's handwritten digits."""

    kind: Literal["digits"]
    """1,797 images of 8 x 8 grey values, contained in the library."""

    def opened(self) -> "Digits":
        """Returns the source; raises DataError if scikit-learn is missing."""
        return Digits()


class Digits:
    """1,797 handwritten digits of 8 x 8 grey values, contained in the library."""

    class_ids = ()
    latents = None

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

    @property
    def fingerprint(self) -> str:
        """The hash of all pixels and labels."""
        contents = self._pixels.tobytes() + self.labels.numpy().tobytes()
        return hashlib.sha256(contents).hexdigest()[:16]

    def key(self, index: int) -> str:
        """Returns `digit-0007` for the seventh after the first."""
        return f"digit-{index:04d}"

    def item(self, index: int) -> SourceItem:
        """Returns one digit as an 8 x 8 grey image."""
        return SourceItem(Image.fromarray(self._pixels[index]))
