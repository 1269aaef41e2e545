"""Decoded values as pixels of 0..255."""

from jaxtyping import Float, UInt8
from torch import Tensor, float32, uint8

from srepa_ds.codec.latent_codec import Rounding


def quantised(
    images: Float[Tensor, "batch 3 H W"], rounding: Rounding
) -> UInt8[Tensor, "batch H W 3"]:
    """Returns 255 (x + 1) / 2 clamped to 0..255 and truncated, as REPA's generate does, or rounded.

    NaN has no defined pixel; look for it before.
    """
    pixels = (255.0 * ((images.to(float32) + 1.0) / 2.0)).clamp(0.0, 255.0)
    if rounding == "round":
        pixels = pixels.round()
    return pixels.to(uint8).permute(0, 2, 3, 1).contiguous()
