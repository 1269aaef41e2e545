"""Decoded values as pixels of 0..255."""

from jaxtyping import Float, UInt8
from torch import Tensor, float32, uint8

from srepa_ds.codec.latent_codec import Rounding
from srepa_ds.errors import DataError


class BrokenImagesError(DataError):
    """Images of a batch hold NaN or infinite values."""

    def __init__(self, rows: list[int], what: str):
        """Takes the numbers of the images in the batch, and which of their values it is."""
        super().__init__(f"the {what} of image(s) {rows} of the batch are NaN or infinite")
        self.rows = rows
        self.what = what


def refuse_broken_rows(values: Float[Tensor, " batch *event"], what: str) -> None:
    """Raises BrokenImagesError if `values` are not finite. The host waits for the device."""
    broken = ~values.isfinite().reshape(len(values), -1).all(1)
    if broken.any():
        raise BrokenImagesError(broken.nonzero().flatten().tolist(), what)


def quantised(
    images: Float[Tensor, "batch 3 H W"], rounding: Rounding
) -> UInt8[Tensor, "batch H W 3"]:
    """Returns 255 (x + 1) / 2 truncated, as REPA's generate does, or 127.5 x + 128 truncated.

    The second is 255 (x + 1) / 2 rounded, halves up; written as SiT, EDM2, MAR and LightningDiT
    do. Both are clamped to 0..255 before. NaN has no defined pixel; look for it before.
    """
    values = images.to(float32)
    pixels = 127.5 * values + 128.0 if rounding == "round" else 255.0 * ((values + 1.0) / 2.0)
    return pixels.clamp(0.0, 255.0).to(uint8).permute(0, 2, 3, 1).contiguous()
