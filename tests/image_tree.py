"""A small folder of images with classes, some of which cannot be read; a random VAE."""

from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from srepa_ds.preparation.config import PrepareConfig
from srepa_ds.schema import load_section


def write_tree(root: Path, *, num_images: int = 45, broken: tuple[int, ...] = ()) -> Path:
    """Writes smooth colour images of three classes; those numbered `broken` are half files."""
    generator = np.random.default_rng(0)
    for number in range(num_images):
        folder = root / f"n{number % 3:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        width, height = generator.integers(14, 70, 2).tolist()
        path = folder / f"image {number:03d}.{'png' if number % 2 else 'JPEG'}"
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)
        if number in broken:
            path.write_bytes(path.read_bytes()[:40])
    return root


def write_config(path: Path, tree: Path, output: Path, **changes: object) -> Path:
    """Writes a configuration that prepares `tree` in pieces of seven images."""
    settings = {
        "kind": "prepare",
        "source": {"kind": "image_folder", "path": str(tree)},
        "image_size": 16,
        "output": str(output),
        "holdout_fraction": 0.2,
        "samples_per_shard": 7,
        **changes,
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def config_of(path: Path, tree: Path, output: Path, **changes: object) -> PrepareConfig:
    """Returns the configuration that `write_config` writes."""
    return load_section(PrepareConfig, write_config(path, tree, output, **changes), ())
