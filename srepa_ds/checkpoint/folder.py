"""The folder of a run's checkpoints: names, validity, and what a kill left behind."""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from srepa_ds.checkpoint.manifest import (
    FOREIGN,
    fault_in,
)
from srepa_ds.errors import CheckpointError, OutputError

FORMAT = "srepa_ds.checkpoint"


VERSION = 1


STATE = "state.json"


LATEST = "latest"


_PREFIX = "step-"


ASIDE = ".writing-"


REPLACED = f"{ASIDE}replaced-"


log = logging.getLogger("srepa_ds")


def step_folder(root: Path, step: int) -> Path:
    """Returns where the checkpoint of `step` lies."""
    return root / f"{_PREFIX}{step:07d}"


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Makes an OutputError of an OSError met in the block."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write the checkpoint under {place}: {error.strerror or error}; earlier "
            "checkpoints are whole, make room or permission and run the same command again"
        ) from error


def fault_of(folder: Path) -> str | None:
    """Returns why the checkpoint in `folder` is not valid, or None if it is."""
    return fault_in(folder, format=FORMAT, version=VERSION, needed=STATE)


def steps_in(root: Path) -> list[Path]:
    """Returns the checkpoint folders under `root`, oldest first, valid or not.

    Among them one that a kill left aside just before another of the same step took its name.
    """
    return sorted((*named(root), *_left_aside(root)), key=step_of)


def put_back(root: Path) -> None:
    """Gives those that a kill left aside their names again, so that they count and are kept.

    For who alone writes there, once no rank is about to open one of them. Raises OutputError.
    """
    with writing(root):
        for path in _left_aside(root):
            path.rename(step_folder(root, step_of(path)))


def _left_aside(root: Path) -> list[Path]:
    """Returns those moved for another of the same step that never took the name."""
    moved = named(root, REPLACED)
    return [path for path in moved if not step_folder(root, step_of(path)).is_dir()]


def named(root: Path, prefix: str = "") -> list[Path]:
    """Returns the folders under `root` that are named as checkpoints are, after `prefix`."""
    beginning = f"{prefix}{_PREFIX}"
    paths = [path for path in root.glob(f"{beginning}*") if path.name[len(beginning) :].isdigit()]
    return [path for path in paths if path.is_dir()]


def newest_valid(root: Path) -> Path | None:
    """Returns the newest valid checkpoint under `root`, or None when there is none at all.

    Says which it passed over and why. Raises CheckpointError when there are checkpoints but none
    is valid, or a newer one is of another format: to go on from before it would throw good training
    away.
    """
    faults = []
    for folder in reversed(steps_in(root)):
        fault = fault_of(folder)
        if fault is None:
            return folder
        if fault.startswith(FOREIGN):
            raise CheckpointError(
                f"{folder} is {fault}; go on with the srepa_ds that wrote it, or move it away"
            )
        log.warning("passing over checkpoint %s: %s", folder, fault)
        faults.append(f"{folder.name}: {fault}")
    if faults:
        raise CheckpointError(
            f"{root} holds no valid checkpoint ({'; '.join(faults)}); restore one, or move the "
            "folder away to start anew"
        )
    return None


def remove_leftovers(root: Path) -> None:
    """Removes what interrupted saves left; for who is about to save, or has just done so."""
    for leftover in root.glob(f"{ASIDE}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def step_of(folder: Path) -> int:
    """Returns the step in the name of a checkpoint's folder."""
    return int(folder.name.rpartition("-")[2])
