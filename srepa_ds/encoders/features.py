"""`Features` of images, and the protocol of the frozen encoders that give them."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


class Features(NamedTuple):
    """The features of a batch of images, float32; None for those an encoder does not have."""

    pooled: Float[Tensor, "batch width"]
    """One vector per image: the class token, the mean over positions, or Inception's pool_3."""

    logits: Float[Tensor, "batch classes"] | None
    """The scores of the encoder's own classes; Inception's without their bias, as ADM has them."""

    spatial: Float[Tensor, "batch spatial_width"] | None = None
    """Features of every position in one vector, for sFID."""


@runtime_checkable
class Extractor(Protocol):
    """A frozen encoder of images of one resolution."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the features of an image, as plain JSON values."""

    @property
    def width(self) -> int:
        """Channels of the pooled features."""

    @property
    def spatial_width(self) -> int | None:
        """Numbers of the spatial features, None without."""

    @property
    def num_classes(self) -> int:
        """Classes of the logits, 0 without."""

    def features(self, images: UInt8[Tensor, "batch 3 height width"]) -> Features:
        """Returns the features of images, on their device; without gradient."""

    def to(self, device: torch.device | str) -> "Extractor":
        """Moves the encoder to `device` and returns it."""
