"""Reads shards: images and labels in safetensors files, memory-mapped.

A folder holds `shard-00000.safetensors`, ... (images uint8 (n, 3, h, w), labels int64 (n,)) and
`index.json`, which is written last: a folder without one is not a data set.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from srepa_ds.data.batch import Batch
from srepa_ds.data.headers import Form, Header, Kind, check_header, read_header
from srepa_ds.data.mapped_files import MappedFiles
from srepa_ds.data.shard_index import FORMAT, VERSION, ShardEntry, ShardIndex, again, read_index
from srepa_ds.data.token_store import TokenStore
from srepa_ds.errors import DataError
from srepa_ds.files import sha256_of


class ShardDataset:
    """An open folder of shards; opening it checks every header and reads no pixel."""

    def __init__(self, folder: Path, token_stores: Sequence[TokenStore | None] = ()):
        """Opens `folder`; `read` returns the tokens of `token_stores` with the images.

        Raises DataError naming the first file that contradicts the index, or the first store that
        belongs to other images.
        """
        self.folder = folder
        self.index: ShardIndex = read_index(folder)
        for entry in self.index.shards:
            _check_header(folder / entry.file, entry, self.index)
        self._files = MappedFiles(
            [folder / entry.file for entry in self.index.shards],
            [entry.num_samples for entry in self.index.shards],
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
        return torch.cat([self._files.file(k)["labels"] for k in range(len(self.index.shards))])

    def read(
        self, indices: Int64[Tensor, " batch"], *, positions: Int64[Tensor, " batch"] | None = None
    ) -> Batch:
        """Returns the samples `indices`, in their order; `positions` default to the indices.

        Raises IndexError outside [0, len).
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

    def verify(self) -> None:
        """Checks the hash and the labels of every shard; reads the whole data set.

        Raises DataError naming the first shard that is damaged.
        """
        for number, entry in enumerate(self.index.shards):
            path = self.folder / entry.file
            found = sha256_of(path)
            if found != entry.sha256:
                raise DataError(
                    f"{path}: contents changed since it was written "
                    f"(sha256 {found}, expected {entry.sha256}); {again(self.folder)}"
                )
            labels = self._files.file(number)["labels"]
            if int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
                raise DataError(
                    f"{path}: labels run from {int(labels.min())} to {int(labels.max())}, "
                    f"expected 0 to {self.num_classes - 1}; {again(self.folder)}"
                )


def shard_facts(num_samples: int, image_shape: tuple[int, ...], dataset_id: str) -> dict[str, Any]:
    """Returns the facts in a shard's header."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "num_samples": num_samples,
        "image_shape": list(image_shape),
        "dataset_id": dataset_id,
    }


def _check_header(path: Path, entry: ShardEntry, index: ShardIndex) -> None:
    """Checks a file's header, shapes and size against the index; raises DataError."""
    kind = Kind("shard", again(path.parent))
    found = read_header(path, kind, expected_bytes=entry.bytes)
    count = found.tensors.get("labels", ("", (0,)))[1][0]
    if count == 0 or entry.num_samples == 0:
        raise DataError(
            f"{path}: an empty shard; the index says {entry.num_samples} samples, "
            f"the file holds {count}; {kind.again}"
        )
    tensors: dict[str, Form] = {
        "images": ("U8", (entry.num_samples, *index.image_shape)),
        "labels": ("I64", (entry.num_samples,)),
    }
    facts = shard_facts(entry.num_samples, index.image_shape, index.dataset_id)
    check_header(path, kind, found, Header(facts, tensors, entry.bytes))
