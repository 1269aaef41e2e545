"""Writes shards: one file of given samples, or a folder of them as the samples come."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from srepa_ds.data.headers import Form, preamble
from srepa_ds.data.pixels import PIXEL_ENCODERS
from srepa_ds.data.prepared_folder import PreparedFolder
from srepa_ds.data.shard_file import shard_facts, shard_name
from srepa_ds.data.shard_index import CURE, DatasetDescription, ShardEntry
from srepa_ds.files import sha256_of, write_aside, writing


class StoredSample(NamedTuple):
    """A sample as a shard holds it."""

    image: UInt8[np.ndarray, "3 height width"] | bytes | None
    """Raw pixels, the bytes of a file, or None, as the data set's `pixels` say."""
    label: int
    key: str
    """Its name in the source."""


def as_stored(
    image: UInt8[np.ndarray, "height width 3"], described: DatasetDescription
) -> bytes | UInt8[np.ndarray, "3 height width"] | None:
    """Returns an image as the shards of a data set hold it, in memory of its own."""
    if described.pixels is None:
        return None
    if described.pixels == "raw":
        return image.transpose(2, 0, 1).copy()
    return PIXEL_ENCODERS[described.pixels](image)


def write_shard(
    folder: Path,
    number: int,
    samples: Sequence[StoredSample],
    described: DatasetDescription,
    *,
    concurrent: bool = False,
) -> ShardEntry:
    """Writes a shard and returns its entry in the index; raises OutputError.

    The samples go into the file one by one, so no second copy of them is in memory. With
    `concurrent`, several processes may write the same shard at once.
    """
    path, count, columns = folder / shard_name(number), len(samples), _columns(samples, described)
    facts = shard_facts(count, described.image_shape, described.dataset_id, pixels=described.pixels)
    forms = {name: column.form for name, column in columns.items()}

    def write(aside: Path) -> None:
        with aside.open("wb") as file:
            file.write(preamble(facts, forms))
            for column in columns.values():
                file.writelines(column.contents)

    with writing(path, cure=CURE):
        write_aside(path, write, concurrent=concurrent)
        return ShardEntry(
            file=path.name,
            num_samples=count,
            bytes=path.stat().st_size,
            sha256=sha256_of(path),
            key_bytes=columns["key_bytes"].form[1][0],
            image_bytes=columns["image_bytes"].form[1][0] if "image_bytes" in columns else 0,
        )


class _Column(NamedTuple):
    """One tensor of a shard: its form, and its contents in turn."""

    form: Form
    contents: Iterable[bytes | memoryview]


def _columns(samples: Sequence[StoredSample], described: DatasetDescription) -> dict[str, _Column]:
    """Returns the tensors of a shard, as `shard_forms` announces them."""
    labels = np.array([sample.label for sample in samples], dtype="<i8")
    columns = {
        "labels": _Column(("I64", (len(samples),)), [labels.data]),
        **_blobs("key", [sample.key.encode() for sample in samples]),
    }
    images = [sample.image for sample in samples]
    if described.pixels == "raw":
        rows = [image.data for image in images if isinstance(image, np.ndarray)]
        columns["images"] = _Column(("U8", (len(samples), *described.image_shape)), rows)
    elif described.pixels is not None:
        columns |= _blobs("image", [image for image in images if isinstance(image, bytes)])
    # The wide numbers first, which aligns all of them; safetensors does the same.
    return dict(sorted(columns.items(), key=lambda item: (item[1].form[0] != "I64", item[0])))


def _blobs(name: str, blobs: list[bytes]) -> dict[str, _Column]:
    """Returns bytes of varying length as the tensors `<name>_bytes` and `<name>_ends`."""
    ends = np.cumsum([len(blob) for blob in blobs], dtype="<i8")
    return {
        f"{name}_bytes": _Column(("U8", (sum(map(len, blobs)),)), blobs),
        f"{name}_ends": _Column(("I64", (len(blobs),)), [ends.data]),
    }


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
        self._samples.append(StoredSample(stored, label, key or f"{self._num_added:08d}"))
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
        self._folder.finish(self._folder.index_of(self._entries))

    def _remove_everything(self) -> None:
        for path in self._attached:
            path.unlink(missing_ok=True)
        self._folder.remove()
        self._claim.close()
