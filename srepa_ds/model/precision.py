"""The precisions that a run can train in."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch

Precision = Literal["fp32", "bf16_autocast", "bf16"]


class Dtypes(NamedTuple):
    """The dtypes of one precision. Masters, Adam's moments and averages are always fp32."""

    weights: torch.dtype
    """Of the weights that the model computes with."""

    products: torch.dtype
    """Of the matrix products in attention and MLP."""

    @property
    def is_autocast(self) -> bool:
        """True if autocast rounds the weights for each product."""
        return self.weights != self.products


PRECISIONS: Mapping[Precision, Dtypes] = {
    "fp32": Dtypes(weights=torch.float32, products=torch.float32),
    "bf16_autocast": Dtypes(weights=torch.float32, products=torch.bfloat16),
    "bf16": Dtypes(weights=torch.bfloat16, products=torch.bfloat16),
}
"""One row per precision; `zero/settings.py` has DeepSpeed's settings for each."""
