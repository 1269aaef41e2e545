"""What a worker process of the loader does: reads whole micro batches, and ends with its rank."""

import shutil

import torch
from torch.utils.data import Dataset, get_worker_info

from srepa_ds.data.batch import Batch
from srepa_ds.data.mirror import is_mirrored
from srepa_ds.data.packed import PackedBatch, packed
from srepa_ds.data.shards import ShardDataset
from srepa_ds.distributed.launcher import die_with_parent
from srepa_ds.distributed.signals import leave_signals_to_parent
from srepa_ds.errors import DataError


def end_with_rank(_number: int) -> None:
    """Lets a worker end with its rank, whatever ends that."""
    leave_signals_to_parent()
    die_with_parent()


def fault_of_workers(error: Exception) -> str:
    """Returns what happened to a worker, and what to do."""
    reason = str(error).split("\n")[0].strip()
    text = f"a data worker has failed ({reason})"
    try:
        room = shutil.disk_usage("/dev/shm").total
    except OSError:
        return f"{text}; look at the log above, or set data.num_workers=0"
    return (
        f"{text}; workers pass batches through /dev/shm, which has {room / 2**20:.4g} MiB in all: "
        "raise it (docker run --shm-size=8g), or set data.num_workers=0"
    )


Delivered = Batch | PackedBatch | DataError
"""A batch of this process, one of a worker, or why there is none."""


class Rows(Dataset[Delivered]):
    """A shard data set addressed by whole micro batches."""

    def __init__(self, dataset: ShardDataset, *, mirror_seed: int | None = None):
        """With `mirror_seed`, half of the samples are mirrored, by a coin per position."""
        self._dataset = dataset
        self._mirror_seed = mirror_seed

    def __getitem__(self, index: tuple[list[int], list[int]]) -> Delivered:
        samples, positions = (torch.tensor(numbers) for numbers in index)
        seed = self._mirror_seed
        mirrored = None if seed is None else is_mirrored(seed, positions)
        try:
            batch = self._dataset.read(samples, positions=positions, mirrored=mirrored)
        except DataError as error:
            # As a value: torch would put a worker's traceback into the message of what it raises.
            return error
        if not get_worker_info():
            return batch
        try:
            return packed(batch)
        except (RuntimeError, MemoryError) as error:
            # Sharing fails here and not, without a word, in the thread that passes batches on.
            return DataError(fault_of_workers(error))

    def __len__(self) -> int:
        return len(self._dataset)
