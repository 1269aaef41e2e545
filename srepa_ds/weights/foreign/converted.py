"""What the conversion of a layout gives."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Converted:
    """Weights under official names, in REPA's convention."""

    weights: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()
    """What was changed or left out."""
