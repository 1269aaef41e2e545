"""Crops source images, and arranges images in a grid to look at."""

import math

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor


def center_crop(image: Image.Image, size: int) -> UInt8[ndarray, "size size 3"]:
    """Returns the RGB centre crop of `image`, as in ADM's evaluation and REPA's preparation.

    The image is halved with a box filter while both sides are at least twice `size`, then resized
    to `size` on the shorter side with PIL's antialiased bicubic filter (upwards too), then cropped.
    Source: guided-diffusion, "center-crop-dhariwal". It must stay PIL to be comparable.
    """
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    resized = (round(image.width * scale), round(image.height * scale))
    pixels = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size].copy()


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
