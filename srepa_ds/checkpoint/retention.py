"""Retention: which checkpoints are kept, which are good, and which one a rollback returns to.

A checkpoint saved right after the step that ruined the weights is whole and valid, but no step from
it is finite. So a checkpoint is good only once a later step was applied. An empty file `good` in
its folder records that for a run that resumes.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from srepa_ds.checkpoint.folder import (
    fault_of,
    named,
    newest_valid,
    step_folder,
    step_of,
    steps_in,
    writing,
)
from srepa_ds.files import despite_full_disk
from srepa_ds.schema import Section

_GOOD = "good"
FAILED = "failed-"
"""Begins the names of checkpoints of which no later step was finite."""


class CheckpointConfig(Section):
    """When checkpoints are written, and which of them are kept."""

    every_steps: int = Field(default=5_000, ge=1)
    """Optimizer steps between checkpoints; one is also written at the end and on a signal. If one
    is due at a skipped step, it is written after the next step that is not skipped."""

    keep_last: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep. The newest good one, from which a later step was
    applied, is always kept too."""

    keep_every_steps: int = Field(default=50_000, ge=0)
    """The first checkpoint at or after each multiple of this is kept forever; 0 keeps none."""

    asynchronous: bool = False
    """Whether to write while training continues. A save then pauses training only while each rank
    copies its share of the state to host memory: 16 bytes per weight, divided by the number of
    ranks. With a GPU that memory is page-locked, and kept for the next save."""


class RollbackPoint(NamedTuple):
    """The checkpoint that a run rolls back to."""

    folder: Path
    is_good: bool
    """False if no checkpoint is known to be good; then this is the newest valid one."""


def mark_good(root: Path, step: int) -> None:
    """Marks the checkpoint of `step`, if it exists, as good: a later step was applied."""
    folder = step_folder(root, step)
    with despite_full_disk(f"{folder.name}/{_GOOD}"):
        if folder.is_dir():
            (folder / _GOOD).touch()


def rollback_point(root: Path) -> RollbackPoint | None:
    """Returns the newest good checkpoint, else the newest valid one; None if there is none at all.

    Renames checkpoints newer than the good one to `failed-step-...`, so that a restart resumes from
    the good one too. Raises OutputError, and the errors of `newest_valid`.
    """
    folders = steps_in(root)
    marked = [folder for folder in folders if is_good(folder)]
    good = next((folder for folder in reversed(marked) if fault_of(folder) is None), None)
    if good is None:
        newest = newest_valid(root)
        return None if newest is None else RollbackPoint(newest, is_good=False)
    with writing(root):
        for folder in folders[folders.index(good) + 1 :]:
            aside = root / f"{FAILED}{step_folder(root, step_of(folder)).name}"
            if aside.is_dir():
                shutil.rmtree(aside)
            folder.rename(aside)
    return RollbackPoint(good, is_good=True)


def prune(root: Path, config: CheckpointConfig, *, newest: int) -> None:
    """Deletes the checkpoints that the retention rule does not keep.

    The newest good one is always kept. `newest` is the step of the newest one. Checkpoints after it
    are damaged (the run resumed before them): they are neither counted nor deleted.
    """
    folders = [folder for folder in steps_in(root) if step_of(folder) <= newest]
    kept = {*folders[-config.keep_last :], *_milestones(folders, config.keep_every_steps)}
    kept |= {*[folder for folder in folders if is_good(folder)][-1:]}
    failed = [folder for folder in named(root, FAILED) if step_of(folder) <= newest]
    for folder in {*folders, *failed} - kept:
        shutil.rmtree(folder, ignore_errors=True)


def _milestones(folders: Sequence[Path], every: int) -> Iterator[Path]:
    """Yields the first of `folders` at or after each multiple of `every`; none if `every` is 0."""
    reached = 0
    for folder in folders:
        if every and step_of(folder) // every > reached:
            reached = step_of(folder) // every
            yield folder


def is_good(folder: Path) -> bool:
    """Returns whether a step after that of the checkpoint was applied."""
    return (folder / _GOOD).is_file()
