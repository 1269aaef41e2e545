"""Mirrors samples left to right: which ones, and whether a data set allows it."""

from jaxtyping import Bool, Int64
from torch import Tensor

from srepa_ds.data.shards import ShardDataset
from srepa_ds.errors import DataError
from srepa_ds.noise import NoiseStream, bits


def is_mirrored(seed: int, positions: Int64[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
    """Returns whether the sample at each position is mirrored: a fair coin per (seed, position)."""
    return (bits(seed, NoiseStream.MIRROR, positions, 1)[:, 0] & 1).bool()


def check_mirror(dataset: ShardDataset) -> None:
    """Checks that every part of a sample can be mirrored; raises DataError."""
    latents = dataset.latents
    if latents is not None and not latents.mirrored:
        raise DataError(
            f"{dataset.folder}: data.mirror needs the latents of the mirrored images, which "
            "it does not hold; prepare it again with "
            "latents.mirrored=true, or set data.mirror=false"
        )
