"""Crops source images, and arranges images in a grid to look at."""

import math

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor

from srepa_ds.errors import DataError

_LARGEST_16_BIT = 65535
_MOST_RESIZED = 1 << 28
"""Pixels, 1 GiB in memory."""


def center_crop(image: Image.Image, size: int) -> UInt8[ndarray, "size size 3"]:
    """Returns the RGB centre crop of `image`, as in ADM's evaluation and REPA's preparation.

    `as_rgb` says what becomes of other modes, and which raise DataError.

    The image is halved with a box filter while both sides are at least twice `size`, then resized
    to `size` on the shorter side with PIL's antialiased bicubic filter (upwards too), then cropped.
    Raises DataError for an image so narrow that this would take more than a gigabyte.
    Source: guided-diffusion, "center-crop-dhariwal". It must stay PIL to be comparable.
    """
    image = as_rgb(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    resized = (round(image.width * scale), round(image.height * scale))
    if math.prod(resized) > _MOST_RESIZED:
        raise DataError(
            f"is so narrow, {image.width} x {image.height} pixels, that it would be resized to "
            f"{resized[0]:,} x {resized[1]:,} before its centre is cut out"
        )
    pixels = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size].copy()


def as_rgb(image: Image.Image) -> Image.Image:
    """Returns `image` in RGB with 8 bits per channel.

    Transparent pixels lie on white (ADM drops the transparency and shows the colours under it). 16
    bits are divided by 257, so that white stays white. Raises DataError for a mode whose range is
    not known: F, and I with numbers that are not of 16 bits.
    """
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode == "F":
        raise _unknown_range(image, "floating-point numbers")
    try:
        if not image.has_transparency_data:
            return image.convert("RGB")
        # Colours multiplied by their opacity convert only to the same colours without it.
        plain = image.convert("LA") if image.mode == "La" else image
        colours = plain.convert("RGBA")
    except (ValueError, ImportError) as error:
        raise DataError(
            f"an image of mode {image.mode} cannot be converted to RGB ({error}); convert it first"
        ) from error
    white = Image.new("RGBA", colours.size, "white")
    return Image.alpha_composite(white, colours).convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > _LARGEST_16_BIT:
        raise _unknown_range(image, f"numbers from {values.min()} to {values.max()}")
    grey = ((values + 128) // 257).astype(np.uint8)
    # A PNG may declare one grey value to be transparent.
    grey[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey).convert("RGB")


def _unknown_range(image: Image.Image, held: str) -> DataError:
    return DataError(
        f"an image of mode {image.mode} holds {held}, and which of them is white is not known; "
        "convert it to 8 or 16 bits per channel"
    )


def image_grid(
    images: UInt8[Tensor, "count 3 height width"], *, columns: int, scale: int = 1
) -> Image.Image:
    """Returns `images` side by side in rows of `columns`, each pixel `scale` pixels wide.

    Images are two pixels apart on white. Raises ValueError if there are none.
    """
    if len(images) == 0:
        raise ValueError("a grid needs at least one image")
    gap = 2
    height, width = images.shape[2] * scale, images.shape[3] * scale
    rows = math.ceil(len(images) / columns)
    size = (columns * (width + gap) + gap, rows * (height + gap) + gap)
    grid = Image.new("RGB", size, "white")
    for number, image in enumerate(images):
        tile = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        row, column = divmod(number, columns)
        place = (gap + column * (width + gap), gap + row * (height + gap))
        grid.paste(tile.resize((width, height), Image.Resampling.NEAREST), place)
    return grid
