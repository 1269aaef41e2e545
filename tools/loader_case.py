"""One case of the loader's benchmark, and the batches that it reads."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from loader_data import REPA
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from srepa_ds.data.headers import Kind, read_header
from srepa_ds.data.loader import BatchLoader, DataConfig
from srepa_ds.data.shards import Parts, ShardDataset

MAPPED = "raw, mapped"
BATCH = 32
PREFETCH = 4


@dataclass(frozen=True)
class Case:
    """What is read, by which reader."""

    size: int
    parts: str
    """`moments`, or `pixels+moments`."""
    reader: str
    """`repa`, a storage of ours, or `raw, mapped`."""
    workers: int
    is_cold: bool

    def folder(self, data: Path) -> Path:
        """Returns the folder of the case's files below that of the benchmark."""
        return data / str(self.size) / self.reader.split(",")[0]

    def batches(self, data: Path) -> Iterator[int]:
        """Returns an endless iterator of sizes of batches, each read in full."""
        readers: dict[str, Callable[[Path, Case], Iterator[int]]] = {REPA: _repa, MAPPED: _mapped}
        return readers.get(self.reader, _shards)(self.folder(data), self)


class OneFilePerImage(Dataset[tuple[Tensor, ...]]):
    """REPA's layout: a PNG without compression and an .npy per image, paired by sorted position."""

    def __init__(self, folder: Path, *, has_images: bool):
        features = folder / "vae-sd"
        self._features = sorted(features.rglob("*.npy"))
        self._images = sorted((folder / "images").rglob("*.png")) if has_images else None
        labels = dict(json.loads((features / "dataset.json").read_text())["labels"])
        self._labels = [labels[path.relative_to(features).as_posix()] for path in self._features]

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        features = torch.from_numpy(np.load(self._features[index]))
        label = torch.tensor(self._labels[index])
        if self._images is None:
            return features, label
        with Image.open(self._images[index]) as image:
            pixels = np.array(image).transpose(2, 0, 1)
        return torch.from_numpy(pixels), features, label


def _repa(folder: Path, case: Case) -> Iterator[int]:
    loader = DataLoader(
        OneFilePerImage(folder, has_images=case.parts != "moments"),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=case.workers,
        prefetch_factor=PREFETCH if case.workers else None,
        persistent_workers=case.workers > 0,
    )
    while True:
        yield from (len(batch[-1]) for batch in loader)


def _shards(folder: Path, case: Case) -> Iterator[int]:
    dataset = ShardDataset(folder, parts=Parts(images=case.parts != "moments"))
    config = DataConfig(folder=folder, num_workers=case.workers, prefetch_batches=PREFETCH)
    with BatchLoader(dataset, config, seed=0, micro_batch_size=BATCH) as batches:
        for batch in batches:
            yield len(batch)


def _mapped(folder: Path, case: Case) -> Iterator[int]:
    """Reads mapped files instead: `images` and `moments` of random samples, without a loader."""
    index = ShardDataset(folder).index
    assert index.latents is not None
    tables = [(index.latents.files, "moments", np.float32, index.latents.stored_shape)]
    if case.parts != "moments":
        tables.append((index.shards, "images", np.uint8, index.image_shape))
    mapped = [
        [_map(folder / e.file, name, kind, (shard.num_samples, *shape)) for e, shard in pairs]
        for entries, name, kind, shape in tables
        for pairs in [list(zip(entries, index.shards, strict=True))]
    ]
    per_shard = index.shards[0].num_samples
    while True:
        order = np.random.default_rng(0).permutation(index.num_samples)
        for start in range(0, len(order) - BATCH + 1, BATCH):
            for files in mapped:
                rows = np.empty((BATCH, *files[0].shape[1:]), files[0].dtype)
                for room, sample in zip(rows, order[start : start + BATCH].tolist(), strict=True):
                    room[...] = files[sample // per_shard][sample % per_shard]
            yield BATCH


def _map(path: Path, name: str, kind: type, shape: tuple[int, ...]) -> np.memmap:
    found = read_header(path, Kind("file", ""), expected_bytes=path.stat().st_size)
    return np.memmap(path, kind, mode="r", offset=found.file.starts[name], shape=shape)
