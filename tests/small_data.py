"""The smallest data set and store of tokens, written as the commands write them."""

from pathlib import Path

import numpy as np
import torch

from srepa_ds.data.prepared_folder import PreparedFolder, prepared_index
from srepa_ds.data.shard_index import DatasetDescription
from srepa_ds.data.shard_writer import ShardWriter
from srepa_ds.data.shards import ShardDataset
from srepa_ds.data.stored_tokens import as_stored
from srepa_ds.data.token_index import TokenDescription, is_finished
from srepa_ds.data.token_store import TokenStore
from srepa_ds.data.token_writer import TokenStoreWriter, claimed

DESCRIBED = DatasetDescription({"name": "test"}, (3, 2, 2), ("zero", "one"))


def prepare(folder: Path, *, samples_per_shard: int = 2) -> None:
    """Does what `srepa-ds prepare` does for one part."""
    if prepared_index(folder, DESCRIBED):
        PreparedFolder(folder, DESCRIBED).tidy_up()
        return
    with ShardWriter(folder, description=DESCRIBED, samples_per_shard=samples_per_shard) as writer:
        for number in range(3):
            writer.add(np.full((2, 2, 3), number, dtype=np.uint8), number % 2)
        writer.attach("preview.png", b"picture")


def store(shards: Path, folder: Path) -> None:
    """Does what `srepa-ds prepare --teacher` does for one store."""
    if is_finished(folder):
        TokenStore(folder).verify()
        return
    index = ShardDataset(shards).index
    described = TokenDescription(
        dataset_id=index.dataset_id,
        teacher={"name": "test"},
        storage="bf16",
        grid=(1, 2),
        width=3,
        has_cls=False,
    )
    writer = TokenStoreWriter(folder, described, index.shards)
    with claimed(folder):
        for number in writer.missing():
            count = index.shards[number].num_samples
            writer.write(number, [as_stored(torch.ones(count, 2, 3), None, storage="bf16")])
        writer.finish(writer.entry(number) for number in range(len(writer.shards)))
