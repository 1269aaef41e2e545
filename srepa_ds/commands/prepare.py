"""`srepa-ds prepare CONFIG`: makes shards of source images, a training and a held-out part."""

import io
import logging
import os
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import UInt8
from numpy import ndarray
from pydantic import Field
from torch import Tensor

from srepa_ds.data.images import center_crop, image_grid
from srepa_ds.data.shard_index import DatasetDescription
from srepa_ds.data.shard_writer import ShardWriter, is_prepared, remove_marker
from srepa_ds.data.shards import ShardDataset
from srepa_ds.data.sources.source import Source, SourceItem
from srepa_ds.data.sources.table import SourceConfig, build_source
from srepa_ds.data.split import stratified_split
from srepa_ds.errors import ConfigError, DataError, Fault
from srepa_ds.schema import Section

PREVIEW_NAME = "preview.png"
_PREVIEW_COLUMNS = 20
_PREVIEW_IMAGES = 200
_PREVIEW_PIXELS = 1200
_COPIES = 2
"""A shard is in memory twice when it is written: image by image, and as one tensor."""
log = logging.getLogger("srepa_ds")


class PrepareConfig(Section):
    """A source of images, and the data set of shards made of it."""

    kind: Literal["prepare"]
    """Tells this file from other configurations."""
    source: SourceConfig
    """The source of the images."""
    image_size: int = Field(ge=1, le=8192)
    """Side of the square images, cut by ADM's centre crop; smaller images are enlarged."""
    output: Path
    """Folder that receives `train/` and `heldout/`."""
    holdout_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Fraction of every class that is held out; 0 writes no `heldout/`."""
    samples_per_shard: int = Field(default=10_000, ge=1)
    """Images in one file; the last shard may hold fewer."""
    seed: int = Field(default=0, ge=0, lt=1 << 64)
    """Decides which images are held out."""


def prepare(config: PrepareConfig) -> dict[str, ShardDataset]:
    """Returns the finished parts by name, written now or found prepared with these settings.

    Raises DataError for a source that cannot be read, OutputError for a folder that cannot be
    written to or holds something else; leaves nothing behind then.
    """
    source = build_source(config.source)
    parts = _parts(config, source)
    descriptions = {part: _describe(config, source, part) for part in parts}
    # All parts are checked first, so that a conflict in one leaves the others unwritten.
    finished = {part: is_prepared(config.output / part, descriptions[part]) for part in parts}
    for part, indices in parts.items():
        if not finished[part]:
            _check_memory(config, len(indices))
    for part, indices in parts.items():
        folder = config.output / part
        if finished[part]:
            remove_marker(folder)
            log.info("%s: already prepared with these settings, nothing to do", folder)
        else:
            _write_part(config, source, folder, indices, descriptions[part])
    return {part: ShardDataset(config.output / part) for part in parts}


def _check_memory(config: PrepareConfig, num_images: int) -> None:
    """Checks that one shard of a part fits into memory; raises ConfigError."""
    image_bytes = 3 * config.image_size**2
    largest = min(config.samples_per_shard, num_images)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _COPIES * largest * image_bytes > memory:
        fit = memory // (2 * _COPIES * image_bytes)
        reason = (
            f"a shard of {largest} images of {config.image_size} px takes "
            f"{largest * image_bytes / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f} GB; "
        )
        cure = f"set it to at most {fit}" if fit else "choose a smaller image_size"
        raise ConfigError("prepare", [Fault("samples_per_shard", reason + cure)])


def _parts(config: PrepareConfig, source: Source) -> dict[str, Tensor]:
    """Returns the indices of the source that belong to each part."""
    split = stratified_split(
        source.labels, holdout_fraction=config.holdout_fraction, seed=config.seed
    )
    parts = {"train": split.train}
    if config.holdout_fraction > 0:
        parts["heldout"] = split.heldout
    for part, indices in parts.items():
        if len(indices) == 0:
            raise DataError(
                f"holdout_fraction {config.holdout_fraction} leaves no image for {part}: the "
                f"source '{config.source.kind}' holds {len(source.labels)}; choose another one"
            )
    return parts


def _describe(config: PrepareConfig, source: Source, part: str) -> DatasetDescription:
    settings = config.model_dump(mode="json", exclude={"kind", "output"})
    return DatasetDescription(
        source={**settings, "part": part},
        image_shape=(3, config.image_size, config.image_size),
        class_names=source.class_names,
    )


def _write_part(
    config: PrepareConfig,
    source: Source,
    folder: Path,
    indices: Tensor,
    described: DatasetDescription,
) -> None:
    with ShardWriter(
        folder, description=described, samples_per_shard=config.samples_per_shard
    ) as writer:
        preview = []
        for done, index in enumerate(indices.tolist(), start=1):
            item = source.item(index)
            pixels = _cropped(item, config.image_size)
            writer.add(pixels, item.label)
            if len(preview) < _PREVIEW_IMAGES:
                preview.append(torch.from_numpy(pixels).permute(2, 0, 1))
            if done % config.samples_per_shard == 0:
                log.info("%s: %d of %d images", folder, done, len(indices))
        writer.attach(PREVIEW_NAME, _preview_png(torch.stack(preview)))
    log.info(
        "%s: %d images in %d classes; look at %s",
        folder,
        len(indices),
        len(source.class_names),
        folder / PREVIEW_NAME,
    )


def _cropped(item: SourceItem, size: int) -> UInt8[ndarray, "size size 3"]:
    try:
        return center_crop(item.image, size)
    except DataError as error:
        raise DataError(f"{item.name}: {error}") from error


def _preview_png(images: Tensor) -> bytes:
    scale = max(1, _PREVIEW_PIXELS // (_PREVIEW_COLUMNS * images.shape[3]))
    contents = io.BytesIO()
    image_grid(images, columns=_PREVIEW_COLUMNS, scale=scale).save(contents, format="PNG")
    return contents.getvalue()
