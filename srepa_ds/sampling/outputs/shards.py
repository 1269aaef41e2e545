"""`shards`: a set as a data set, which trainings and metrics read; keys are the indices."""

from collections.abc import Iterator
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from jaxtyping import Int64
from numpy import ndarray

from srepa_ds.data.prepared_folder import PreparedFolder, ShardReceipt
from srepa_ds.data.shard_index import INDEX_NAME, DatasetDescription, ShardEntry, read_index
from srepa_ds.data.shard_writer import StoredSample, as_stored, write_shard
from srepa_ds.data.shards import Parts, ShardDataset
from srepa_ds.sampling.outputs.content import Block, Content, Output, SetFacts, regrouped
from srepa_ds.sampling.sample_set import PROVENANCE

SHARDS = "shards"
_MOST_IMAGES = 1000
# Three blocks of this size are in memory at once.
_MOST_BYTES = 16 << 20
_ROWS = 64


class ShardsOutput(Output):
    """The data set; what a killed process has written of it stays."""

    name = SHARDS

    def is_there(self, folder: Path) -> bool:
        """Returns whether the index is there, which is written last."""
        return (folder / SHARDS / INDEX_NAME).is_file()

    def bytes_of(self, num_values: int) -> int:
        """Returns the room that it takes."""
        return num_values

    def write(self, folder: Path, content: Content, facts: SetFacts) -> None:
        """Writes the shards that are missing, and the index; raises OutputError."""
        prepared = PreparedFolder(folder / SHARDS, _description(content, facts))
        with prepared.claimed():
            entries = list(_entries(prepared, content))
            prepared.write(PROVENANCE, facts.provenance.text().encode())
            prepared.finish(prepared.index_of(entries))

    def tidy_up(self, folder: Path) -> None:
        """Removes the notes of a preparation whose index is written; raises DataError."""
        index = read_index(folder / SHARDS)
        description = DatasetDescription(index.source, index.image_shape, index.class_names)
        PreparedFolder(folder / SHARDS, description).tidy_up()

    def read(self, folder: Path) -> Content:
        """Returns the set in the shards; raises DataError if they are damaged."""
        return ShardsContent(folder / SHARDS)


class ShardsContent(Content):
    """The set in a folder that `ShardsOutput` wrote."""

    def __init__(self, folder: Path):
        self._folder = folder

    @cached_property
    def labels(self) -> Int64[ndarray, " samples"]:
        """The label of each image; raises DataError."""
        dataset = ShardDataset(self._folder, parts=Parts(images=False, moments=False))
        return dataset.read(torch.arange(len(dataset))).labels.numpy()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels; raises DataError."""
        channels, height, width = self._dataset.index.image_shape
        return height, width, channels

    def blocks(self) -> Iterator[Block]:
        """Yields the images, a few at a time; raises DataError."""
        for indices in torch.arange(len(self._dataset)).split(_ROWS):
            yield self._dataset.read(indices).pixels.permute(0, 2, 3, 1).contiguous().numpy()

    @cached_property
    def _dataset(self) -> ShardDataset:
        return ShardDataset(self._folder, parts=Parts(moments=False))


def _description(content: Content, facts: SetFacts) -> DatasetDescription:
    height, width, channels = content.image_shape
    return DatasetDescription(
        source={"kind": "sample", "provenance": dict(facts.provenance.facts)},
        image_shape=(channels, height, width),
        class_names=tuple(map(str, range(facts.num_classes))),
    )


def _entries(prepared: PreparedFolder, content: Content) -> Iterator[ShardEntry]:
    """Yields the entry of each shard in turn, after writing the shard if it is missing."""
    described, labels = prepared.description, content.labels.tolist()
    rows = max(1, min(_MOST_IMAGES, _MOST_BYTES // prod(described.image_shape)))
    for number, images in enumerate(regrouped(content.blocks(), rows)):
        receipt = prepared.receipt(number)
        if receipt is None or receipt.shard is None:
            samples = [
                StoredSample(as_stored(image, described), labels[index], f"{index:06d}")
                for index, image in enumerate(images, start=number * rows)
            ]
            receipt = ShardReceipt(shard=write_shard(prepared.folder, number, samples, described))
            prepared.note(number, receipt)
        assert receipt.shard is not None
        yield receipt.shard
