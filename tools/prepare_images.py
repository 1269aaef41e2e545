"""Makes JPEG files like ImageNet's of the photographs that come with scikit-image."""

from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

_SIZE = (500, 375)
"""ImageNet's most frequent size."""
_QUALITY = 95
_CLASSES = 10


def write_photographs(root: Path, num_images: int) -> Path:
    """Writes `num_images` random parts of photographs, in a folder for each of ten classes."""
    photographs = [
        Image.fromarray(pixels)
        for pixels in (data.astronaut(), data.chelsea(), data.coffee(), data.rocket())
    ]
    generator = np.random.default_rng(0)
    for number in range(num_images):
        folder = root / f"n{number % _CLASSES:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        image = _part(photographs[number % len(photographs)], generator)
        image.save(folder / f"{number:08d}.JPEG", quality=_QUALITY)
    return root


def _part(photograph: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Returns a random part of the shape of ImageNet's images, mirrored half of the time."""
    share = generator.uniform(0.7, 1.0)
    scale = share * min(photograph.width / _SIZE[0], photograph.height / _SIZE[1])
    width, height = int(_SIZE[0] * scale), int(_SIZE[1] * scale)
    left = int(generator.integers(0, photograph.width - width + 1))
    top = int(generator.integers(0, photograph.height - height + 1))
    box = (left, top, left + width, top + height)
    part = photograph.resize(_SIZE, Image.Resampling.LANCZOS, box=box)
    if generator.random() < 0.5:
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return part
