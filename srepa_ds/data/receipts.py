"""Receipts: the notes beside the finished pieces of a data set that is being prepared."""

from typing import Any

from srepa_ds.data.shard_index import LatentDescription, LatentFileEntry, ShardEntry
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
