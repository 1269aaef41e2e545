"""Reads shards: images and labels in safetensors files.

A folder holds `shard-00000.safetensors`, ... (images uint8 (n, 3, h, w), labels int64 (n,)) and
`index.json`, which is written last: a folder without one is not a data set.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from srepa_ds.data.batch import Batch
from srepa_ds.data.contents import IndexedFile, are_small, check_contents
from srepa_ds.data.headers import Form, Header, Kind, check_header, read_header, rows_of
from srepa_ds.data.sample_files import SampleFiles, StoredFile
from srepa_ds.data.shard_index import FORMAT, VERSION, ShardEntry, ShardIndex, again, read_index
from srepa_ds.data.token_store import TokenStore
from srepa_ds.errors import DataError

log = logging.getLogger("srepa_ds")


class ShardDataset:
    """An open folder of shards; opening it checks every header and reads no pixel."""

    def __init__(self, folder: Path, token_stores: Sequence[TokenStore | None] = ()):
        """Opens `folder`; `read` returns the tokens of `token_stores` with the images.

        Raises DataError naming the first file that contradicts the index, or the first store that
        belongs to other images.
        """
        self.folder = folder
        self.index: ShardIndex = read_index(folder)
        self._files = SampleFiles(
            [check_shard(folder, self.index, entry) for entry in self.index.shards],
            [entry.num_samples for entry in self.index.shards],
            rows_of(_forms(1, self.index)),
        )
        self._token_stores = tuple(token_stores)
        for store in self._token_stores:
            if store is not None:
                store.check_fits(self.index, folder)

    def __len__(self) -> int:
        return self.index.num_samples

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.index.image_shape

    @property
    def num_classes(self) -> int:
        """Number of classes; every label is below it."""
        return self.index.num_classes

    @property
    def labels(self) -> Int64[Tensor, " samples"]:
        """The labels of the whole data set."""
        return self._files.tensor("labels")

    @property
    def indexed_files(self) -> tuple[IndexedFile, ...]:
        """The hash that the index gives for each shard."""
        return indexed_shards(self.folder, self.index)

    def read(
        self, indices: Int64[Tensor, " batch"], *, positions: Int64[Tensor, " batch"] | None = None
    ) -> Batch:
        """Returns the samples `indices`, in their order; `positions` default to the indices.

        Raises IndexError outside [0, len), and DataError for a file that can no longer be read.
        """
        found = self._files.gather(indices)
        return Batch(
            images=found["images"],
            moments=None,
            labels=found["labels"],
            sample_ids=indices,
            positions=indices if positions is None else positions,
            teacher_tokens=tuple(s if s is None else s.read(indices) for s in self._token_stores),
        )

    def compare_if_small(self) -> None:
        """Compares the shards with the index if that takes a moment, and says so otherwise.

        Raises DataError naming the first shard that is damaged.
        """
        if not are_small(self.indexed_files):
            log.info("%s: not compared with its index; `srepa-ds verify` does it", self.folder)
            return
        for file in self.indexed_files:
            check_contents(file)

    def samples_in(self, path: Path) -> range | None:
        """Returns the samples whose images or tokens lie in a file, None for any other file."""
        entries = [(self.folder, self.index.shards)]
        entries += [(store.folder, store.index.files) for store in self._token_stores if store]
        for folder, files in entries:
            end = 0
            for entry in files:
                start, end = end, end + entry.num_samples
                if folder / entry.file == path:
                    return range(start, end)
        return None

    def verify(self) -> None:
        """Checks the hash and the labels of every shard; reads the whole data set.

        Raises DataError naming the first shard that is damaged.
        """
        for number, file in enumerate(self.indexed_files):
            check_contents(file)
            labels = self._files.tensor("labels", file=number)
            check_labels(file.path, labels, num_classes=self.num_classes)


def shard_facts(num_samples: int, image_shape: tuple[int, ...], dataset_id: str) -> dict[str, Any]:
    """Returns the facts in a shard's header."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "num_samples": num_samples,
        "image_shape": list(image_shape),
        "dataset_id": dataset_id,
    }


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
    facts = shard_facts(entry.num_samples, index.image_shape, index.dataset_id)
    expected = Header(facts, _forms(entry.num_samples, index), entry.bytes)
    check_header(path, kind, found.header, expected)
    return found.file


def _forms(num_samples: int, index: ShardIndex) -> dict[str, Form]:
    """Returns the tensors of a shard of `num_samples` images."""
    return {"images": ("U8", (num_samples, *index.image_shape)), "labels": ("I64", (num_samples,))}


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
