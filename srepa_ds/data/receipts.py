"""Receipts: the notes beside the finished pieces of a data set that is being prepared."""

from collections.abc import Mapping
from typing import Any

from srepa_ds.data.shard_file import number_of
from srepa_ds.data.shard_index import (
    LatentDescription,
    LatentFileEntry,
    ShardEntry,
    ShardIndex,
)
from srepa_ds.schema import Section


class Skipped(Section):
    """An image of the source that was left out."""

    key: str
    """Its name in the source."""
    reason: str
    """Why it could not be read."""


class ShardReceipt(Section):
    """What was written of one part of the source."""

    shard: ShardEntry | None
    """The entry of the shard; None if no image could be read."""
    skipped: tuple[Skipped, ...] = ()
    """The images that were left out."""


class LatentReceipt(Section):
    """What was written of the latents of one shard."""

    latents: LatentFileEntry
    """The entry of the file."""
    described: LatentDescription
    """What decides the latents."""
    settings: dict[str, Any] = {}
    """The settings of the encoding that decide the last bits: precision, tiles, size of batches."""


def shards_of(
    index: ShardIndex | None, receipts: Mapping[int, ShardReceipt]
) -> dict[int, ShardEntry]:
    """Returns the entries of the shards by number, from the index if there is one."""
    if index is not None:
        return {number_of(entry.file): entry for entry in index.shards}
    return {n: receipt.shard for n, receipt in receipts.items() if receipt.shard is not None}
