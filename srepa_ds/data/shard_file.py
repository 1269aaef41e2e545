"""One shard: the images, labels and keys of some samples in a safetensors file.

Images are raw pixels, `images` uint8 (n, 3, h, w), or the bytes of PNG or WebP files one after
another, `image_bytes`, with the place behind each in `image_ends`. `labels` are int64 (n,); the
keys, which name the samples in the source, are UTF-8 in `key_bytes` and `key_ends`.
"""

from pathlib import Path
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from srepa_ds.data.contents import IndexedFile
from srepa_ds.data.headers import Form, Header, Kind, check_header, read_header, rows_of
from srepa_ds.data.sample_files import SampleFiles
from srepa_ds.data.shard_index import FORMAT, VERSION, PixelStorage, ShardEntry, ShardIndex, again
from srepa_ds.data.stored_files import StoredFile
from srepa_ds.errors import DataError


def shard_name(number: int) -> str:
    """Returns the name of a shard's file."""
    return f"shard-{number:05d}.safetensors"


def number_of(name: str) -> int:
    """Returns the number in the name of a shard's file."""
    return int(Path(name).stem.removeprefix("shard-"))


def shard_facts(
    num_samples: int,
    image_shape: tuple[int, ...],
    dataset_id: str,
    *,
    version: int = VERSION,
    pixels: PixelStorage | None = "raw",
) -> dict[str, Any]:
    """Returns the facts in a shard's header."""
    facts = {
        "format": FORMAT,
        "version": version,
        "num_samples": num_samples,
        "image_shape": list(image_shape),
        "dataset_id": dataset_id,
    }
    return facts if version == 1 else {**facts, "pixels": pixels}


def shard_forms(entry: ShardEntry, index: ShardIndex) -> dict[str, Form]:
    """Returns the tensors of a shard, as the index announces them."""
    count = entry.num_samples
    forms: dict[str, Form] = {}
    if index.pixels == "raw":
        forms["images"] = ("U8", (count, *index.image_shape))
    elif index.pixels is not None:
        forms["image_bytes"] = ("U8", (entry.image_bytes,))
        forms["image_ends"] = ("I64", (count,))
    forms["labels"] = ("I64", (count,))
    if index.version > 1:
        forms["key_bytes"] = ("U8", (entry.key_bytes,))
        forms["key_ends"] = ("I64", (count,))
    return forms


def check_shard(folder: Path, index: ShardIndex, entry: ShardEntry) -> StoredFile:
    """Returns one shard, whose header, shapes and size fit the index; raises DataError."""
    path, kind = folder / entry.file, Kind("shard", again(folder))
    found = read_header(path, kind, expected_bytes=entry.bytes)
    _, shape = found.header.tensors.get("labels", ("", ()))
    if entry.num_samples == 0 or shape == (0,):
        held = shape[0] if shape else "none"
        raise DataError(
            f"{path}: an empty shard; the index says {entry.num_samples} samples, "
            f"the file holds {held}; {kind.again}"
        )
    facts = shard_facts(
        entry.num_samples,
        index.image_shape,
        index.dataset_id,
        version=index.version,
        pixels=index.pixels,
    )
    check_header(path, kind, found.header, Header(facts, shard_forms(entry, index), entry.bytes))
    return found.file


def labels_of(file: StoredFile, num_samples: int) -> Int64[Tensor, " samples"]:
    """Returns the labels of one shard; raises DataError."""
    rows = rows_of({"labels": ("I64", (num_samples,))})
    return SampleFiles([file], [num_samples], rows).tensor("labels")


def check_labels(path: Path, labels: Int64[Tensor, " samples"], *, num_classes: int) -> None:
    """Checks that every label of a shard names a class; raises DataError."""
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise DataError(
            f"{path}: labels run from {int(labels.min())} to {int(labels.max())}, "
            f"expected 0 to {num_classes - 1}; {again(path.parent)}"
        )


def indexed_shards(folder: Path, index: ShardIndex) -> tuple[IndexedFile, ...]:
    """Returns the hash that the index of a data set gives for each shard."""
    cure = again(folder)
    return tuple(IndexedFile(folder / e.file, e.bytes, e.sha256, cure) for e in index.shards)
