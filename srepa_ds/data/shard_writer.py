"""Writes shards: one file of given samples, or a folder of them as the samples come."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors.torch import save_file
from torch import Tensor

from srepa_ds.data.headers import metadata_of
from srepa_ds.data.pixels import PIXEL_ENCODERS
from srepa_ds.data.prepared_folder import PreparedFolder
from srepa_ds.data.shard_file import blob_tensors, shard_facts, shard_name
from srepa_ds.data.shard_index import CURE, DatasetDescription, ShardEntry
from srepa_ds.files import sha256_of, write_aside, writing


class StoredSample(NamedTuple):
    """A sample as a shard holds it."""

    image: UInt8[np.ndarray, "height width 3"] | bytes | None
    """Raw pixels, the bytes of a file, or None, as the data set's `pixels` say."""
    label: int
    key: str
    """Its name in the source."""


def as_stored(
    image: UInt8[np.ndarray, "height width 3"], described: DatasetDescription
) -> bytes | np.ndarray | None:
    """Returns an image as the shards of a data set hold it."""
    if described.pixels is None:
        return None
    return image if described.pixels == "raw" else PIXEL_ENCODERS[described.pixels](image)


def write_shard(
    folder: Path,
    number: int,
    samples: Sequence[StoredSample],
    described: DatasetDescription,
    *,
    concurrent: bool = False,
) -> ShardEntry:
    """Writes a shard and returns its entry in the index; raises OutputError.

    With `concurrent`, several processes may write the same shard at once.
    """
    path, count = folder / shard_name(number), len(samples)
    tensors = {
        "labels": torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        **blob_tensors("key", [sample.key.encode() for sample in samples]),
    }
    images = [sample.image for sample in samples]
    if described.pixels == "raw":
        tensors["images"] = _planes([image for image in images if isinstance(image, np.ndarray)])
    elif described.pixels is not None:
        blobs = [image for image in images if isinstance(image, bytes)]
        tensors |= blob_tensors("image", blobs)
    facts = shard_facts(
        count,
        described.image_shape,
        described.dataset_id,
        pixels=described.pixels,
    )
    with writing(path, cure=CURE):
        write_aside(
            path,
            lambda aside: save_file(tensors, aside, metadata=metadata_of(facts)),
            concurrent=concurrent,
        )
        return ShardEntry(
            file=path.name,
            num_samples=count,
            bytes=path.stat().st_size,
            sha256=sha256_of(path),
            key_bytes=len(tensors["key_bytes"]),
            image_bytes=len(tensors.get("image_bytes", ())),
        )


class ShardWriter:
    """Collects samples and writes a shard whenever it is full; a context manager.

    The index is written when the `with` block ends without an exception. An exception removes
    everything written; after a kill, the next writer with the same description starts over.
    """

    def __init__(self, folder: Path, *, description: DatasetDescription, samples_per_shard: int):
        self._folder = PreparedFolder(folder, description)
        self._samples_per_shard = samples_per_shard
        self._samples: list[StoredSample] = []
        self._entries: list[ShardEntry] = []
        self._attached: list[Path] = []
        self._num_added = 0
        self._claim = ExitStack()

    def __enter__(self) -> "ShardWriter":
        """Locks the folder and clears what a killed writer left in it.

        Raises OutputError if the folder cannot be written to or holds anything else, or if another
        process writes into it.
        """
        self._claim.enter_context(self._folder.claimed(keep=False))
        return self

    def add(
        self, image: UInt8[np.ndarray, "height width 3"], label: int, key: str | None = None
    ) -> None:
        """Adds a sample, by default named after its number.

        Raises OutputError if a full shard cannot be written.
        """
        stored = as_stored(image, self._folder.description)
        own = stored.copy() if isinstance(stored, np.ndarray) else stored
        self._samples.append(StoredSample(own, label, key or str(self._num_added)))
        self._num_added += 1
        if len(self._samples) == self._samples_per_shard:
            self._write_shard()

    def attach(self, name: str, contents: bytes) -> None:
        """Writes `contents` to a file beside the shards; raises OutputError."""
        self._attached.append(self._folder.folder / name)
        self._folder.write(name, contents)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Finishes the data set; after an exception, removes everything written instead."""
        try:
            if kind is None:
                self._finish()
        except BaseException:
            self._remove_everything()
            raise
        if kind is not None:
            self._remove_everything()
        self._claim.close()

    def _write_shard(self) -> None:
        number, samples = len(self._entries), self._samples
        self._entries.append(
            write_shard(self._folder.folder, number, samples, self._folder.description)
        )
        self._samples = []

    def _finish(self) -> None:
        if self._samples:
            self._write_shard()
        self._folder.write_index(self._entries)

    def _remove_everything(self) -> None:
        for path in self._attached:
            path.unlink(missing_ok=True)
        self._folder.remove()
        self._claim.close()


def _planes(images: Sequence[np.ndarray]) -> Tensor:
    """Returns images as the rows of one tensor, each channel by itself."""
    height, width, _ = images[0].shape
    planes = torch.empty((len(images), 3, height, width), dtype=torch.uint8)
    for row, image in zip(planes.numpy(), images, strict=True):
        row[:] = image.transpose(2, 0, 1)
    return planes
