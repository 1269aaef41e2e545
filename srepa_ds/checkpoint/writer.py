"""Saves a run's checkpoints, while training goes on if the configuration says so."""

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from srepa_ds.checkpoint.folder import remove_leftovers
from srepa_ds.checkpoint.fragment_file import Piece
from srepa_ds.checkpoint.manifest import FileEntry
from srepa_ds.checkpoint.retention import CheckpointConfig, mark_good, prune
from srepa_ds.checkpoint.saving import UnfinishedCheckpoint
from srepa_ds.distributed import ranks
from srepa_ds.files import despite_full_disk

log = logging.getLogger("srepa_ds")

# Asking all ranks costs a collective and, on a GPU, a wait for the device.
_ASK_EVERY_POLLS = 5


class CheckpointWriter:
    """Writes checkpoints under one folder and deletes those the retention rule does not keep.

    `save`, `poll` and `wait` are collective: all ranks call them at the same steps. At most one
    checkpoint is under way; a kill or an error before it is whole leaves the one before the newest.
    """

    # A rank's thread writes that rank's file and nothing else. Whether all files are on disk, so
    # that the manifest may follow and the folder be renamed, the main threads ask each other, in
    # `poll` and `wait`: collectives are matched by their order alone, which a thread's would not
    # have among training's; and with a process group of the threads' own, ranks would learn of an
    # error at different steps, and those who go on would wait for those who have left.

    def __init__(self, root: Path, config: CheckpointConfig, *, rank: int):
        self._root, self._config, self._rank = root, config, rank
        self._thread: ThreadPoolExecutor | None = None
        if config.asynchronous:
            self._thread = ThreadPoolExecutor(
                max_workers=1, thread_name_prefix="checkpoint", initializer=_same_device()
            )
        self._under_way: tuple[UnfinishedCheckpoint, Future[FileEntry]] | None = None
        self._polls = 0
        self._whole: int | None = None
        self._unproven: int | None = None
        self._applied_at = 0

    def goes_on_from(self, step: int) -> None:
        """Takes note that training begins at `step`, or has gone back there."""
        self._unproven = self._applied_at = step

    def applied(self, step: int) -> None:
        """Takes note that `step` was applied, so that a checkpoint before it is good."""
        self._applied_at = step
        self._prove()

    def save(self, *, step: int, pieces: Iterable[Piece], state: dict[str, Any]) -> None:
        """Returns once the checkpoint of `step` holds what `pieces` and `state` are now.

        Without `asynchronous` it is whole then. Otherwise its predecessor is, and `poll` or `wait`
        finish it. Raises OutputError on every rank if any could not write either of them.
        """
        self._finish()
        self._applied_at = step
        unfinished = UnfinishedCheckpoint(
            self._root, step=step, pieces=pieces, state=state, rank=self._rank
        )
        if self._thread is None:
            self._complete(unfinished, unfinished.write)
        else:
            self._under_way = unfinished, self._thread.submit(unfinished.write)
            self._polls = 0

    def poll(self) -> int | None:
        """Returns the step of a checkpoint that has become whole since last asked, or None.

        For every step of training: it asks the other ranks only while a checkpoint is under way,
        and then every fifth time. Raises OutputError on every rank if any could not write.
        """
        if self._under_way is not None:
            self._polls += 1
            written = self._under_way[1].done()
            if self._polls % _ASK_EVERY_POLLS == 0 and not ranks.any_rank(not written):
                self._finish()
        return self._news()

    def wait(self) -> int | None:
        """Returns what `poll` does, after waiting for the checkpoint that is under way.

        Raises OutputError on every rank if any could not write.
        """
        self._finish()
        return self._news()

    def close(self) -> None:
        """Ends the thread once its file is written; a checkpoint nobody waited for is given up.

        Not collective: a rank that met an error may call it alone.
        """
        self._under_way = None
        if self._thread is not None:
            self._thread.shutdown()

    def _finish(self) -> None:
        if self._under_way is not None:
            (unfinished, written), self._under_way = self._under_way, None
            self._complete(unfinished, written.result)

    def _complete(self, unfinished: UnfinishedCheckpoint, written: Callable[[], FileEntry]) -> None:
        folder = unfinished.finish(written)
        self._whole = self._unproven = unfinished.step
        if self._rank == 0:
            with despite_full_disk(f"in {self._root}"):
                remove_leftovers(self._root)
                prune(self._root, self._config, newest=unfinished.step)
            log.info("saved %s", folder)
        self._prove()

    def _prove(self) -> None:
        step = self._unproven
        if step is None or step >= self._applied_at:
            return
        self._unproven = None
        if self._rank == 0:
            mark_good(self._root, step)
            # Until now the one before it had to stay.
            with despite_full_disk(f"in {self._root}"):
                prune(self._root, self._config, newest=step)

    def _news(self) -> int | None:
        news, self._whole = self._whole, None
        return news


def _same_device() -> Callable[[], None] | None:
    """Returns what makes a new thread use this one's GPU, which is not the first for every rank."""
    if not torch.cuda.is_available():
        return None
    return partial(torch.cuda.set_device, torch.cuda.current_device())
