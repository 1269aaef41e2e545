"""The order of the data as a function of (seed, position), and the loader that delivers it.

The position of training in the data is one integer, the global sample counter. It depends neither
on the number of ranks nor on that of workers, so a run can resume with other numbers of both.
"""

import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Int64
from pydantic import Field
from torch import Tensor

from srepa_ds.data.batch import Batch
from srepa_ds.data.packed import PackedBatch
from srepa_ds.data.reading import Reading, default_threads
from srepa_ds.data.shards import ShardDataset
from srepa_ds.data.worker import Delivered, Rows, end_with_rank, fault_of_workers
from srepa_ds.errors import DataError
from srepa_ds.noise import NoiseStream, bits
from srepa_ds.schema import MayChange, Section

_NEVER = 1 << 62
_POSITIONS_AT_ONCE = 1 << 20


class DataConfig(Section):
    """The training images and how they are read."""

    folder: Annotated[Path, MayChange]
    """A folder of shards, as `srepa-ds prepare` writes it."""
    num_workers: Annotated[int, MayChange] = Field(default=0, ge=0)
    """Processes per rank that read and decode ahead; with 0 the training process does it. One
    worker decodes about 600 images of 256 px (WebP) per second or 180 of 512 px, so 2 feed a GPU
    that trains on 450 of 256 px. Raw pixels and latents alone need none: the training process
    reads thousands per second."""
    prefetch_batches: Annotated[int, MayChange] = Field(default=4, ge=1)
    """Micro batches that each worker keeps ready."""
    mirror: bool = False
    """Mirrors each sample left to right or not, by a coin of its own in each epoch. The published
    recipes of REPA do not mirror. Stored latents need `latents.mirrored` when they are prepared;
    with stored teacher tokens it cannot be had."""
    read_threads: Annotated[int | None, MayChange] = Field(default=None, ge=1, le=64)
    """Reads under way at once in each process; null: 1 on local disks, 8 on network file systems,
    where each read waits for an answer."""
    read_attempts: Annotated[int, MayChange] = Field(default=3, ge=1, le=20)
    """Attempts at a read that fails as network disks may do for a moment (EIO, ESTALE, ETIMEDOUT,
    EAGAIN), after waits of 1, 2, ... seconds."""

    def reading(self) -> Reading:
        """Returns how a process reads the files."""
        return Reading(self.read_threads or default_threads(self.folder), self.read_attempts)


def epoch_permutation(seed: int, epoch: int, num_samples: int) -> Int64[Tensor, " samples"]:
    """Returns the order of the samples in one epoch, a pure function of its arguments."""
    words = bits(seed, NoiseStream.DATA_ORDER, torch.arange(num_samples), 2, draw=epoch)
    return torch.argsort((words[:, 0] << 30) | (words[:, 1] >> 2), stable=True)


class DataOrder:
    """The endless order of a data set: epoch after epoch, each in its own permutation."""

    def __init__(self, *, seed: int, num_samples: int):
        self._seed = seed
        self._num_samples = num_samples
        self._permutations: dict[int, Tensor] = {}

    def sample_at(self, positions: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
        """Returns the data set index for each value of the global sample counter."""
        epochs = positions // self._num_samples
        places = positions % self._num_samples
        samples = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            inside = epochs == epoch
            samples[inside] = self._permutation(epoch)[places[inside]]
        return samples

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._permutations:
            # A batch may span two epochs; older ones never return.
            kept = {key: value for key, value in self._permutations.items() if key == epoch - 1}
            order = epoch_permutation(self._seed, epoch, self._num_samples)
            self._permutations = {**kept, epoch: order}
        return self._permutations[epoch]


def steps_that_read(
    order: DataOrder,
    samples: range,
    *,
    positions: range,
    batch_size: int,
    first_step: int,
) -> Int64[Tensor, " steps"]:
    """Returns the steps that read one of `samples`, in rising order.

    Step `first_step` + 1 takes the first `batch_size` of `positions`, and so on.
    """
    found = [torch.empty(0, dtype=torch.int64)]
    for block in torch.arange(positions.start, positions.stop).split(_POSITIONS_AT_ONCE):
        read = order.sample_at(block)
        inside = (read >= samples.start) & (read < samples.stop)
        found.append((block[inside] - positions.start) // batch_size)
    return first_step + 1 + torch.cat(found).unique()


class BatchLoader:
    """An endless iterator of one rank's micro batches; close it, or use it in a `with` block.

    The global step that starts at position g takes [g, g + micro x accumulation x world); in it,
    micro step a of rank r takes micro positions from g + (a x world + r) x micro.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        config: DataConfig,
        *,
        seed: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        start_position: int = 0,
    ):
        self._config = config
        self._dataset = dataset.read_by(config.reading())
        self._seed = seed
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._world_size = world_size
        self._accumulation = accumulation
        self._start_position = start_position
        self._delivered = 0
        self._batches: Iterator[Delivered] | None = None

    @property
    def position(self) -> int:
        """The global sample counter after the last whole step delivered: resume from here."""
        steps = self._delivered // self._accumulation
        return self._start_position + steps * self._accumulation * self._samples_per_micro_step

    def __iter__(self) -> "BatchLoader":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._transport()
        batch = self._next_of(self._batches)
        self._delivered += 1
        return batch

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; the next batch would start them again."""
        self._batches = None

    def _next_of(self, batches: Iterator[Delivered]) -> Batch:
        """Returns the next batch; raises DataError if it cannot be read or a worker has died."""
        try:
            batch = next(batches)
        except (RuntimeError, OSError, EOFError) as error:
            if not self._config.num_workers:
                raise
            raise DataError(fault_of_workers(error)) from error
        if isinstance(batch, DataError):
            raise batch
        return batch.unpacked() if isinstance(batch, PackedBatch) else batch

    @property
    def _samples_per_micro_step(self) -> int:
        return self._micro_batch_size * self._world_size

    def _transport(self) -> Iterator[Delivered]:
        # Imported here because it imports all of torch's data loading.
        from torchdata.stateful_dataloader import StatefulDataLoader

        workers = self._config.num_workers
        if workers:
            self._dataset.make_ready()
        rows = Rows(self._dataset, mirror_seed=self._seed if self._config.mirror else None)
        with warnings.catch_warnings():
            # torchdata 0.11 calls torch.set_vital, which torch has deprecated.
            warnings.filterwarnings("ignore", message=".*set_vital.*")
            loader = StatefulDataLoader(
                rows,
                batch_size=None,
                sampler=self._requests(),
                num_workers=workers,
                worker_init_fn=end_with_rank,
                prefetch_factor=self._config.prefetch_batches if workers else None,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),
                snapshot_every_n_steps=_NEVER,
            )
            with _death_told_at_next():
                return iter(loader)

    def _requests(self) -> "_Requests":
        taken = self._delivered * self._samples_per_micro_step
        return _Requests(
            DataOrder(seed=self._seed, num_samples=len(self._dataset)),
            first=self._start_position + taken + self._rank * self._micro_batch_size,
            stride=self._samples_per_micro_step,
            micro_batch_size=self._micro_batch_size,
        )


@contextmanager
def _death_told_at_next() -> Iterator[None]:
    """Keeps torch from interrupting this process, wherever it is, when a worker dies.

    The next batch tells it as well, some seconds later; in the middle of a step an exception would
    leave other ranks waiting.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


class _Requests:
    """The endless sequence of (sample ids, positions) of one rank's micro batches."""

    def __init__(self, order: DataOrder, *, first: int, stride: int, micro_batch_size: int):
        self._order = order
        self._first = first
        self._stride = stride
        self._micro_batch_size = micro_batch_size

    def __iter__(self) -> Iterator[tuple[list[int], list[int]]]:
        start = self._first
        while True:
            positions = torch.arange(start, start + self._micro_batch_size)
            # Lists, because a tensor would travel to a worker through a file descriptor.
            yield self._order.sample_at(positions).tolist(), positions.tolist()
            start += self._stride
