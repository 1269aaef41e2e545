"""How much of an unfinished data set is written, told by its receipts."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from srepa_ds.data.prepared_folder import LatentReceipt, ShardReceipt
from srepa_ds.documents.json_reader import read_json
from srepa_ds.errors import ConfigError
from srepa_ds.schema import Section, validated

S = TypeVar("S", bound=Section)


class Progress(NamedTuple):
    """The pieces of a data set that have receipts."""

    shards: int
    samples: int
    skipped: int
    """Images that could not be read."""
    latents: int
    """Files of latents."""


def progress_in(folder: Path) -> Progress:
    """Returns how much is written; nothing for a finished data set, whose index has replaced it."""
    receipts = list(_receipts(folder, "shard-*.json", ShardReceipt))
    shards = [receipt.shard for receipt in receipts if receipt.shard is not None]
    return Progress(
        shards=len(shards),
        samples=sum(shard.num_samples for shard in shards),
        skipped=sum(len(receipt.skipped) for receipt in receipts),
        latents=len(list(_receipts(folder, "latents-*.json", LatentReceipt))),
    )


def _receipts(folder: Path, pattern: str, schema: type[S]) -> Iterator[S]:
    """Yields the receipts that can be read; others count for nothing in a preparation too."""
    for path in sorted(folder.glob(pattern)):
        try:
            yield validated(schema, read_json(path), source=str(path))
        except (OSError, ValueError, ConfigError):
            continue
