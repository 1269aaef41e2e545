"""A picture of a sample of a data set, class by class."""

import io
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional as F

from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.data.images import image_grid
from srepa_ds.data.shards import ShardDataset
from srepa_ds.files import write_aside, writing
from srepa_ds.preparation.inspection import spread

_COLUMNS = 16
_IMAGES = 256
_SIDE = 128
"""Pixels of the longer side of an image on the sheet; larger ones are averaged down."""
_AT_ONCE = 16


def write_sheet(path: Path, dataset: ShardDataset, codec: LatentCodec | None) -> None:
    """Writes a PNG of images that are spread evenly over the data set, sorted by class.

    Without images, the latents are decoded by `codec`. Raises OutputError and DataError.
    """
    chosen = spread(_IMAGES, len(dataset))
    chosen = chosen[dataset.labels[chosen].argsort(stable=True)]
    images = torch.cat([_shown(dataset, codec, part) for part in chosen.split(_AT_ONCE)])
    scale = max(1, _SIDE // max(images.shape[2:]) // 2)
    contents = io.BytesIO()
    image_grid(images, columns=_COLUMNS, scale=scale).save(contents, format="PNG")
    with writing(path, cure="choose another path with --sheet"):
        write_aside(path, lambda aside: aside.write_bytes(contents.getvalue()))


def _shown(
    dataset: ShardDataset, codec: LatentCodec | None, indices: Tensor
) -> UInt8[Tensor, "batch 3 height width"]:
    batch = dataset.read(indices)
    if batch.images is not None:
        images = batch.images
    else:
        assert codec is not None
        images = codec.decode(codec.encode(batch, seed=0)).permute(0, 3, 1, 2).cpu()
    longest = max(images.shape[2:])
    if longest <= _SIDE:
        return images
    size = [max(1, side * _SIDE // longest) for side in images.shape[2:]]
    return F.interpolate(images.float(), size=size, mode="area").round().byte()
