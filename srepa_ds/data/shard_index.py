"""The index of a folder of shards: written last, read first."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from srepa_ds.data.index_document import INDEX_NAME as INDEX_NAME
from srepa_ds.data.index_document import FileName, check_different, read_index_document
from srepa_ds.errors import DataError, listed
from srepa_ds.files import looked_for
from srepa_ds.schema import Section

FORMAT = "srepa-ds shards"
VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 has raw pixels and labels, but neither keys nor latents."""

PixelStorage = Literal["raw", "png", "webp"]
CURE = "choose a folder you may write to, with free space"
"""What to do where a data set cannot be written."""

_PREPARE = "`srepa-ds prepare CONFIG`"


@dataclass(frozen=True)
class DatasetDescription:
    """Everything that decides a prepared data set: equal descriptions, equal shards."""

    source: dict[str, Any]
    """The settings that chose and shaped the samples, as plain JSON values."""
    image_shape: tuple[int, int, int]
    """Channels, height, width."""
    class_names: tuple[str, ...]
    class_ids: tuple[str, ...] = ()
    """The source's own names of the classes, such as WordNet ids; may be empty."""
    pixels: PixelStorage | None = "raw"
    """How images are stored, all without loss; None if the shards hold none."""

    @property
    def dataset_id(self) -> str:
        """The hash of the description; every shard carries it."""
        facts = [FORMAT, VERSION, self.source, self.image_shape, self.class_names, self.pixels]
        text = json.dumps(facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class ShardEntry(Section):
    """The index's entry for one shard."""

    file: FileName
    """Name inside the folder."""
    num_samples: int = Field(ge=0)
    """Samples in the shard."""
    bytes: int = Field(ge=0)
    """Size of the file."""
    sha256: str
    """Hash of the file, in hexadecimal."""
    key_bytes: int = Field(default=0, ge=0)
    """Bytes of all keys."""
    image_bytes: int = Field(default=0, ge=0)
    """Bytes of all encoded images; 0 for raw ones."""


class LatentDescription(Section):
    """Everything that decides the latents of a data set, beside its images."""

    codec: dict[str, Any]
    """The identity of the codec that encoded them."""
    values: Literal["moments", "samples"]
    """`moments`: mean and standard deviation of the posterior; `samples`: one draw from it."""
    dtype: Literal["fp16", "fp32"]
    """How the numbers are stored."""
    latent_shape: tuple[int, int, int]
    """Channels, height, width of a latent."""
    mirrored: bool
    """Whether the latents of the mirrored images are there too."""
    scale: float | tuple[float, ...] | None = None
    """What models multiply with by default, after `shift`; the stored latents are neither."""
    shift: float | tuple[float, ...] | None = None
    """What models subtract by default."""

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of what is stored; moments have two numbers for each value."""
        channels, height, width = self.latent_shape
        return (2 * channels if self.values == "moments" else channels), height, width


class LatentFileEntry(Section):
    """The index's entry for the latents of one shard."""

    file: FileName
    """Name inside the folder."""
    shard_sha256: str
    """Hash of the shard that they belong to."""
    bytes: int = Field(ge=0)
    """Size of the file."""
    sha256: str
    """Hash of the file, in hexadecimal."""


class LatentIndex(LatentDescription):
    """The latents of a data set, and their files."""

    files: tuple[LatentFileEntry, ...]
    """One per shard, in the same order."""


class ShardIndex(Section):
    """The contents of `index.json`."""

    format: str
    """Always `srepa-ds shards`."""
    version: int
    """Version of the format."""
    dataset_id: str
    """Hash of `source`, `image_shape` and `class_names`."""
    num_samples: int = Field(ge=0)
    """Samples in all shards."""
    image_shape: tuple[int, int, int]
    """Channels, height, width."""
    num_classes: int = Field(gt=0)
    """Every label is below it."""
    class_names: tuple[str, ...]
    """One per label."""
    class_ids: tuple[str, ...] = ()
    """The source's own names of the classes; one per label, or none at all."""
    pixels: PixelStorage | None = "raw"
    """How images are stored; None if the shards hold none."""
    source: dict[str, Any]
    """The settings that chose and shaped the samples."""
    num_skipped: int = Field(default=0, ge=0)
    """Images of the source that could not be read and were left out."""
    latents: LatentIndex | None = None
    """The latents of the images, if they were encoded."""
    shards: tuple[ShardEntry, ...]
    """In the order of the sample indices."""


def read_index(folder: Path) -> ShardIndex:
    """Returns the index of `folder`.

    Raises DataError if the folder or its index is missing, or if the index is invalid, of another
    version, or contradicts itself.
    """
    try:
        is_there = folder.is_dir()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{folder}: {reason}; make it readable, or correct the path") from error
    if not is_there:
        raise DataError(
            f"{folder}: no such data folder{looked_for(folder)}; prepare it with {_PREPARE}, or "
            "correct the path"
        )
    if inner := _data_sets_in(folder):
        raise DataError(
            f"{folder}: holds no {INDEX_NAME}, but {listed(inner, ' and ')} in it "
            f"{'are data sets' if len(inner) > 1 else 'is a data set'}; give such a folder"
        )
    index = read_index_document(
        folder,
        ShardIndex,
        format_name=FORMAT,
        versions=READABLE_VERSIONS,
        missing=f"this is not a finished data set; prepare it with {_PREPARE}",
        again=again(folder),
    )
    _check_sums(folder / INDEX_NAME, index)
    names = [entry.file for entry in index.shards]
    names += [entry.file for entry in index.latents.files] if index.latents else []
    check_different(folder / INDEX_NAME, names, again=again(folder))
    return index


def _data_sets_in(folder: Path) -> list[str]:
    """Returns the names of the data sets inside a folder that is none itself."""
    if os.path.exists(folder / INDEX_NAME):
        return []
    return sorted(path.parent.name + "/" for path in folder.glob(f"*/{INDEX_NAME}"))


def _check_sums(path: Path, index: ShardIndex) -> None:
    total = sum(entry.num_samples for entry in index.shards)
    if total != index.num_samples:
        raise DataError(
            f"{path}: says {index.num_samples} samples, but its shards hold {total}; "
            f"{again(path.parent)}"
        )
    if len(index.class_names) != index.num_classes:
        raise DataError(
            f"{path}: says {index.num_classes} classes and names {len(index.class_names)}; "
            f"{again(path.parent)}"
        )
    if index.class_ids and len(index.class_ids) != index.num_classes:
        raise DataError(
            f"{path}: says {index.num_classes} classes and gives ids of {len(index.class_ids)}; "
            f"{again(path.parent)}"
        )
    if index.latents is not None:
        wanted = [entry.sha256 for entry in index.shards]
        if [entry.shard_sha256 for entry in index.latents.files] != wanted:
            raise DataError(
                f"{path}: its latents are not those of its shards; {again(path.parent)}"
            )
    if index.num_samples == 0:
        raise DataError(f"{path}: the data set holds no samples; {again(path.parent)}")


def again(folder: Path) -> str:
    """Returns the cure for a damaged data set, for an error message."""
    return f"delete {folder} and prepare it again with {_PREPARE}"
