"""When a run saves, which checkpoints stay, and which are good: those from which a step was taken.

What is saved right after the step that ruined the weights is whole and valid, yet no step from it
is finite. So a checkpoint counts as good once a later step was applied; an empty file of that name
in its folder says so to whoever resumes the run.
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
_FAILED = "failed-"


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every_steps: int = Field(default=5_000, ge=1)
    """Optimizer steps between checkpoints; one is also written at the end and when interrupted. One
    that falls due at a skipped step is written after the next that is not."""

    keep_last: int = Field(default=2, ge=1)
    """How many of the newest are kept, and beside them always the newest that is known to be good:
    from which a step was taken."""

    keep_every_steps: int = Field(default=50_000, ge=0)
    """The first checkpoint at or after each multiple of this is kept for good; 0 keeps none."""

    asynchronous: bool = False
    """Write while training goes on. A save then stops it only while this rank's share of the state
    is copied to host memory: 16 bytes per weight, shared by all ranks. Next to a GPU that memory is
    page-locked, and kept for the next save."""


class ReturnPoint(NamedTuple):
    """Where a run that fails goes on."""

    folder: Path
    is_good: bool
    """False if no step was ever taken from it, and there is no other."""


def mark_good(root: Path, step: int) -> None:
    """Says of the checkpoint of `step`, if there is one, that a later step was applied."""
    folder = step_folder(root, step)
    with despite_full_disk(f"{folder.name}/{_GOOD}"):
        if folder.is_dir():
            (folder / _GOOD).touch()


def return_point(root: Path) -> ReturnPoint | None:
    """Returns the newest good checkpoint, else the newest valid one; None if there is none at all.

    Those newer than the good one are set aside as `failed-step-...`, so that the run resumes from
    it too. Raises OutputError, and what `newest_valid` does.
    """
    folders = steps_in(root)
    marked = [folder for folder in folders if _is_marked(folder)]
    good = next((folder for folder in reversed(marked) if fault_of(folder) is None), None)
    if good is None:
        newest = newest_valid(root)
        return None if newest is None else ReturnPoint(newest, is_good=False)
    with writing(root):
        for folder in folders[folders.index(good) + 1 :]:
            aside = root / f"{_FAILED}{step_folder(root, step_of(folder)).name}"
            if aside.is_dir():
                shutil.rmtree(aside)
            folder.rename(aside)
    return ReturnPoint(good, is_good=True)


def prune(root: Path, config: CheckpointConfig, *, newest: int) -> None:
    """Deletes the checkpoints the retention rule does not keep.

    The newest good one stays whatever the rule says. `newest` is the step of the newest one. Later
    ones are damaged, for the run resumed before them; they neither count as kept nor are deleted.
    """
    folders = [folder for folder in steps_in(root) if step_of(folder) <= newest]
    kept = {*folders[-config.keep_last :], *_milestones(folders, config.keep_every_steps)}
    kept |= {*[folder for folder in folders if _is_marked(folder)][-1:]}
    failed = [folder for folder in named(root, _FAILED) if step_of(folder) <= newest]
    for folder in {*folders, *failed} - kept:
        shutil.rmtree(folder, ignore_errors=True)


def _milestones(folders: Sequence[Path], every: int) -> Iterator[Path]:
    """Yields the first of `folders` at or after each multiple of `every`; none if that is 0."""
    reached = 0
    for folder in folders:
        if every and step_of(folder) // every > reached:
            reached = step_of(folder) // every
            yield folder


def _is_marked(folder: Path) -> bool:
    return (folder / _GOOD).is_file()
