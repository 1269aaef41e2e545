"""A small data set with images in any storage, and latents beside them."""

from pathlib import Path

import numpy as np
import torch

from srepa_ds.data.latent_file import write_latents
from srepa_ds.data.prepared_folder import PreparedFolder
from srepa_ds.data.shard_index import DatasetDescription, LatentDescription, LatentIndex
from srepa_ds.data.shard_writer import ShardWriter
from srepa_ds.data.shards import ShardDataset

SHAPE = (3, 16, 8)
LATENT_SHAPE = (2, 2, 1)
NUM_CLASSES = 5


def image(number: int) -> np.ndarray:
    """Returns the pixels of a sample, height x width x 3; they differ from their mirror image."""
    draw = np.random.default_rng(number)
    return draw.integers(0, 256, (*SHAPE[1:], SHAPE[0]), dtype=np.uint8)


def latent(number: int, *, mirrored: bool = False) -> torch.Tensor:
    """Returns the moments of a sample, mean and standard deviation."""
    channels, height, width = LATENT_SHAPE
    value = float(number) + (0.5 if mirrored else 0.0)
    return torch.full((2 * channels, height, width), value)


def write_data(
    folder: Path,
    *,
    count: int = 20,
    storage: str | None = "raw",
    samples_per_shard: int = 6,
    has_latents: bool = True,
    mirrored: bool = True,
) -> Path:
    """Writes `count` samples, each of class number % NUM_CLASSES; returns the folder."""
    names = tuple(str(number) for number in range(NUM_CLASSES))
    described = DatasetDescription({"name": "small"}, SHAPE, names, pixels=storage)
    with ShardWriter(folder, description=described, samples_per_shard=samples_per_shard) as writer:
        for number in range(count):
            writer.add(image(number), number % NUM_CLASSES)
    if has_latents:
        _add_latents(folder, described, mirrored)
    return folder


def _add_latents(folder: Path, described: DatasetDescription, mirrored: bool) -> None:
    index, start, entries = ShardDataset(folder).index, 0, []
    latents = LatentDescription(
        codec={"kind": "test"},
        values="moments",
        dtype="fp32",
        latent_shape=LATENT_SHAPE,
        mirrored=mirrored,
    )
    for number, shard in enumerate(index.shards):
        numbers = range(start, start + shard.num_samples)
        plain = torch.stack([latent(n) for n in numbers])
        turned = torch.stack([latent(n, mirrored=True) for n in numbers]) if mirrored else None
        entries.append(
            write_latents(folder, number, latents, plain, turned, shard_sha256=shard.sha256)
        )
        start = numbers.stop
    whole = LatentIndex(**dict(latents), files=tuple(entries))
    prepared = PreparedFolder(folder, described)
    prepared.finish(prepared.index_of(index.shards, latents=whole))
