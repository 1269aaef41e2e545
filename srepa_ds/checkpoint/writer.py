"""Saves a run's checkpoints, in the background if the configuration says so."""

import logging
from collections.abc import Callable, Iterable, Mapping
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
    """Writes checkpoints under one folder, marks the good ones and deletes those not to keep.

    `save`, `poll` and `wait` are collective: all ranks call them at the same steps. At most one
    checkpoint is in progress. If a kill or an error interrupts it, the previous one stays the
    newest.
    """

    # A rank's thread writes that rank's file and nothing else. Whether all files are on disk, so
    # that the manifest may follow and the folder be renamed, the main threads ask each other in
    # `poll` and `wait`. A thread cannot ask: collectives are matched by their order alone, which
    # its own would not have among those of training. With a process group for the threads, ranks
    # would learn of an error at different steps, and some would wait for others that have left.

    last_applied: int
    """The last step that was not skipped."""

    last_saved: int
    """The step of the last checkpoint, finished or in progress."""

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        *,
        rank: int,
        step: int = 0,
        extra: Mapping[str, Any] | None = None,
    ):
        """Starts at `step`, whose checkpoint, if there is one, counts as saved.

        Every checkpoint's state gets the entries of `extra` as well.
        """
        self._root, self._config, self._rank = root, config, rank
        self._extra = dict(extra or {})
        self._thread: ThreadPoolExecutor | None = None
        if config.asynchronous:
            self._thread = ThreadPoolExecutor(
                max_workers=1, thread_name_prefix="checkpoint", initializer=_same_device()
            )
        self._in_progress: tuple[UnfinishedCheckpoint, Future[FileEntry]] | None = None
        self._polls = 0
        self.restart_at(step)

    def restart_at(self, step: int) -> None:
        """Starts again at `step`, after a rollback: the steps after it no longer count."""
        self.last_applied = self.last_saved = step
        self._unproven: int | None = step

    def note_applied(self, step: int) -> None:
        """Records that `step` was applied, so a finished checkpoint of an earlier step is good."""
        self.last_applied = step
        self._mark_if_good()

    def is_due(self, step: int) -> bool:
        """Returns whether a checkpoint was due at `step`, or at a step since the last one."""
        every = self._config.every_steps
        return step // every > self.last_saved // every

    def save(self, *, step: int, pieces: Iterable[Piece], state: Mapping[str, Any]) -> None:
        """Saves what `pieces` and `state` hold now as the checkpoint of `step`.

        Without `asynchronous` it is finished on return. Otherwise its predecessor is, and `poll` or
        `wait` will finish it. Raises OutputError on every rank if any could not write either.
        """
        self._finish()
        unfinished = UnfinishedCheckpoint(
            self._root, step=step, pieces=pieces, state={**state, **self._extra}, rank=self._rank
        )
        self.last_saved = step
        if self._thread is None:
            self._complete(unfinished, unfinished.write)
        else:
            self._in_progress = unfinished, self._thread.submit(unfinished.write)
            self._polls = 0

    def poll(self) -> None:
        """Finishes the checkpoint in progress if all ranks have written their files.

        Call it after every training step. It asks the other ranks only while a checkpoint is in
        progress, and then every fifth time. Raises OutputError on every rank if any could not
        write.
        """
        if self._in_progress is not None:
            self._polls += 1
            is_written = self._in_progress[1].done()
            if self._polls % _ASK_EVERY_POLLS == 0 and not ranks.any_rank(not is_written):
                self._finish()

    def wait(self) -> None:
        """Waits for the checkpoint in progress and finishes it.

        Raises OutputError on every rank if any could not write.
        """
        self._finish()

    def close(self) -> None:
        """Ends the thread once its file is written, and abandons a checkpoint in progress.

        Not collective: a rank that met an error may call it alone.
        """
        self._in_progress = None
        if self._thread is not None:
            self._thread.shutdown()

    def _finish(self) -> None:
        if self._in_progress is not None:
            (unfinished, written), self._in_progress = self._in_progress, None
            self._complete(unfinished, written.result)

    def _complete(self, unfinished: UnfinishedCheckpoint, written: Callable[[], FileEntry]) -> None:
        folder = unfinished.finish(written)
        self._unproven = unfinished.step
        if self._rank == 0:
            with despite_full_disk(f"in {self._root}"):
                remove_leftovers(self._root)
                prune(self._root, self._config, newest=unfinished.step)
            log.info("saved %s", folder)
        self._mark_if_good()

    def _mark_if_good(self) -> None:
        step = self._unproven
        if step is None or step >= self.last_applied:
            return
        self._unproven = None
        if self._rank == 0:
            mark_good(self._root, step)
            # Until now the good one before it had to stay.
            with despite_full_disk(f"in {self._root}"):
                prune(self._root, self._config, newest=step)


def _same_device() -> Callable[[], None] | None:
    """Returns a function that makes a new thread use this thread's GPU instead of the first."""
    if not torch.cuda.is_available():
        return None
    return partial(torch.cuda.set_device, torch.cuda.current_device())
