"""The source `digits`: scikit-learn's handwritten digits."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from srepa_ds.data.sources.source import SourceItem
from srepa_ds.errors import DataError


class Digits:
    """1,797 handwritten digits of 8 x 8 grey values, contained in the library."""

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
