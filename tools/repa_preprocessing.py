"""REPA's preparation of pixels as published, written from its description: one process.

Decode, ADM's centre crop, one PNG without compression for each image, and `dataset.json`.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def crop(image: Image.Image, size: int) -> np.ndarray:
    """Returns ADM's centre crop: halve with a box filter, resize bicubically, cut."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    pixels = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


def preprocess(source: Path, output: Path, size: int) -> None:
    """Writes `images/ddddd/img........png` for each image of `source`, in the order of paths."""
    paths = sorted(path for path in source.rglob("*.JPEG"))
    classes = {name: label for label, name in enumerate(sorted({p.parent.name for p in paths}))}
    labels = []
    for number, path in enumerate(paths):
        name = f"{number:08d}"
        file = output / "images" / name[:5] / f"img{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            pixels = crop(image.convert("RGB"), size)
        Image.fromarray(pixels).save(file, format="png", compress_level=0, optimize=False)
        labels.append([f"{name[:5]}/{file.name}", classes[path.parent.name]])
    (output / "images" / "dataset.json").write_text(json.dumps({"labels": labels}))


if __name__ == "__main__":
    preprocess(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
