"""Shards: images and labels in safetensors files, read by memory map, written all or nothing.

A folder holds `shard-00000.safetensors`, ... (images uint8 (n, 3, h, w), labels int64 (n,)) and
`index.json`, which is written last: a folder without it is not a data set.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from srepa_ds.data.batch import Batch
from srepa_ds.data.shard_index import FORMAT, VERSION, ShardEntry, ShardIndex, read_index
from srepa_ds.errors import DataError
from srepa_ds.files import sha256_of

_HEADER_KEY = "srepa_ds"
_AGAIN = "delete the folder and prepare it again with `srepa-ds prepare CONFIG`"


class ShardDataset:
    """A folder of shards, opened: every header was held against the index, no pixel was read."""

    def __init__(self, folder: Path):
        """Opens `folder`; raises DataError naming the first file that does not fit the index."""
        self.folder = folder
        self.index: ShardIndex = read_index(folder)
        for entry in self.index.shards:
            _check_header(folder / entry.file, entry, self.index)
        counts = torch.tensor([entry.num_samples for entry in self.index.shards])
        self._ends = counts.cumsum(0)
        self._opened: dict[int, Mapping[str, Tensor]] = {}

    def __len__(self) -> int:
        return self.index.num_samples

    def __getstate__(self) -> dict[str, object]:
        # A worker process maps the files itself instead of receiving their contents.
        return {**self.__dict__, "_opened": {}}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.index.image_shape

    @property
    def num_classes(self) -> int:
        """How many classes the labels tell apart."""
        return self.index.num_classes

    @property
    def labels(self) -> Int64[Tensor, "samples"]:
        """The labels of the whole data set."""
        return torch.cat([self._shard(k)["labels"] for k in range(len(self.index.shards))])

    def read(
        self, indices: Int64[Tensor, "batch"], *, positions: Int64[Tensor, "batch"] | None = None
    ) -> Batch:
        """Returns the samples of `indices` in their order; `positions` default to the indices.

        Raises IndexError outside [0, len).
        """
        if len(indices) and not (0 <= int(indices.min()) and int(indices.max()) < len(self)):
            raise IndexError(f"sample index outside [0, {len(self)})")
        images = torch.empty((len(indices), *self.image_shape), dtype=torch.uint8)
        labels = torch.empty(len(indices), dtype=torch.int64)
        shard_of = torch.searchsorted(self._ends, indices, right=True)
        for shard in shard_of.unique().tolist():
            rows = (shard_of == shard).nonzero()[:, 0]
            start = self._ends[shard] - self.index.shards[shard].num_samples
            inside = indices[rows] - start
            images[rows] = self._shard(shard)["images"][inside]
            labels[rows] = self._shard(shard)["labels"][inside]
        return Batch(
            images=images,
            moments=None,
            labels=labels,
            sample_ids=indices,
            positions=indices if positions is None else positions,
        )

    def verify(self) -> None:
        """Returns if every byte is as it was written and every label names a class.

        Reads the whole data set. Raises DataError naming the first shard that differs.
        """
        for number, entry in enumerate(self.index.shards):
            path = self.folder / entry.file
            found = sha256_of(path)
            if found != entry.sha256:
                raise DataError(
                    f"{path}: contents changed since it was written "
                    f"(sha256 {found}, expected {entry.sha256}); {_AGAIN}"
                )
            labels = self._shard(number)["labels"]
            if int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
                raise DataError(
                    f"{path}: labels run from {int(labels.min())} to {int(labels.max())}, "
                    f"expected 0 to {self.num_classes - 1}; {_AGAIN}"
                )

    def _shard(self, number: int) -> Mapping[str, Tensor]:
        """Returns the tensors of one shard, mapped, not read."""
        if number not in self._opened:
            path = self.folder / self.index.shards[number].file
            with safe_open(path, framework="pt") as file:
                self._opened[number] = {name: file.get_tensor(name) for name in file.keys()}
        return self._opened[number]


def shard_header(num_samples: int, image_shape: tuple[int, ...], dataset_id: str) -> dict[str, str]:
    """Returns the metadata of a shard's header; `header_facts` reads it.

    One key, because safetensors writes several in an order that changes from run to run.
    """
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "num_samples": num_samples,
        "image_shape": list(image_shape),
        "dataset_id": dataset_id,
    }
    return {_HEADER_KEY: json.dumps(facts)}


def header_facts(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Returns what the metadata of a shard's header says of it; nothing if it is no shard's."""
    try:
        facts = json.loads((metadata or {}).get(_HEADER_KEY, "{}"))
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _check_header(path: Path, entry: ShardEntry, index: ShardIndex) -> None:
    """Returns if the file's header, shapes and size are what the index says; else DataError."""
    if not path.is_file():
        raise DataError(f"{path}: missing, but the index names it; {_AGAIN}")
    size = path.stat().st_size
    try:
        with safe_open(path, framework="pt") as file:
            header = header_facts(file.metadata())
            found = {name: _form(file, name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path}: not a readable shard ({error}); it has {size} bytes, "
            f"the index says {entry.bytes}; {_AGAIN}"
        ) from error
    count = found.get("labels", ("", (0,)))[1][0]
    if count == 0 or entry.num_samples == 0:
        raise DataError(
            f"{path}: an empty shard; the index says {entry.num_samples} samples, "
            f"the file holds {count}; {_AGAIN}"
        )
    shape = index.image_shape
    expected_header = shard_header(entry.num_samples, shape, index.dataset_id)
    _same(path, "header", header, header_facts(expected_header))
    expected = {
        "images": ("U8", (entry.num_samples, *shape)),
        "labels": ("I64", (entry.num_samples,)),
    }
    _same(path, "tensors", found, expected)
    _same(path, "size", {"bytes": size}, {"bytes": entry.bytes})


def _form(file: safe_open, name: str) -> tuple[str, tuple[int, ...]]:
    view = file.get_slice(name)
    return view.get_dtype(), tuple(view.get_shape())


def _same(path: Path, what: str, found: Mapping, expected: Mapping) -> None:
    differing = [name for name, value in expected.items() if found.get(name) != value]
    if differing:
        name = differing[0]
        raise DataError(
            f"{path}: the {what} of this shard and the index disagree about {name}: "
            f"found {found.get(name)}, the index says {expected[name]}; {_AGAIN}"
        )
