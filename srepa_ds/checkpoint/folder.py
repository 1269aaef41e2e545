"""The folder of a run's checkpoints: names, validity, and leftovers of interrupted saves."""

import logging
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from srepa_ds import files
from srepa_ds.checkpoint.manifest import FOREIGN, fault_in
from srepa_ds.errors import CheckpointError

FORMAT = "srepa_ds.checkpoint"
VERSION = 1

STATE = "state.json"
"""The name of the file of everything but the fragments, in a checkpoint's folder."""

LATEST = "latest"
"""The name of the file that names the newest checkpoint, beside the checkpoints."""

ASIDE = ".writing-"
"""Begins the temporary name of a checkpoint that is being written."""

REPLACED = f"{ASIDE}replaced-"
"""Begins the temporary name of a checkpoint while another of the same step takes its name."""

_PREFIX = "step-"

log = logging.getLogger("srepa_ds")


def step_folder(root: Path, step: int) -> Path:
    """Returns the folder of the checkpoint of `step`."""
    return root / f"{_PREFIX}{step:07d}"


def step_of(folder: Path) -> int:
    """Returns the step in the name of a checkpoint's folder."""
    return int(folder.name.rpartition("-")[2])


def writing(place: Path) -> AbstractContextManager[None]:
    """Turns an OSError in the block into an OutputError about the checkpoint under `place`."""
    cure = (
        "earlier checkpoints are whole; make room or fix its permissions, and run the command again"
    )
    return files.writing(f"the checkpoint under {place}", cure=cure)


def fault_of(folder: Path) -> str | None:
    """Returns why the checkpoint in `folder` is not valid, or None if it is."""
    return fault_in(folder, format=FORMAT, version=VERSION, needed=STATE)


def steps_in(root: Path) -> list[Path]:
    """Returns the checkpoint folders under `root`, oldest first, valid or not.

    They include replaced checkpoints that a kill left under their temporary name.
    """
    return sorted((*named(root), *_orphans(root)), key=step_of)


def restore_names(root: Path) -> None:
    """Renames checkpoints that a kill left under a temporary name, so that retention counts them.

    Call it from one process, once every rank has read the one it resumes from. Raises OutputError.
    """
    with writing(root):
        for path in _orphans(root):
            path.rename(step_folder(root, step_of(path)))


def _orphans(root: Path) -> list[Path]:
    """Returns the replaced checkpoints whose successor never took the name."""
    replaced = named(root, REPLACED)
    return [path for path in replaced if not step_folder(root, step_of(path)).is_dir()]


def named(root: Path, prefix: str = "") -> list[Path]:
    """Returns the folders under `root` named like checkpoints, with `prefix` before the name."""
    beginning = f"{prefix}{_PREFIX}"
    paths = [path for path in root.glob(f"{beginning}*") if path.is_dir()]
    return [path for path in paths if _is_number(path.name.removeprefix(beginning))]


def _is_number(text: str) -> bool:
    """Returns whether `text` is digits alone; `isdigit` would accept a superscript two."""
    return text.isascii() and text.isdecimal()


def newest_valid(root: Path) -> Path | None:
    """Returns the newest valid checkpoint under `root`, or None if it is empty.

    Logs each one it skips, and why. Raises CheckpointError if none of the checkpoints is valid, or
    a newer one has another format: resuming from an earlier one would throw good training away.
    """
    faults = []
    for folder in reversed(steps_in(root)):
        fault = fault_of(folder)
        if fault is None:
            return folder
        if fault.startswith(FOREIGN):
            raise CheckpointError(
                f"{folder} is {fault}; continue with the srepa_ds that wrote it, or move it away"
            )
        log.warning("skipping checkpoint %s: %s", folder, fault)
        faults.append(f"{folder.name}: {fault}")
    if faults:
        raise CheckpointError(
            f"{root} holds no valid checkpoint ({'; '.join(faults)}); restore one, or move the "
            "folder away to start over"
        )
    return None


def remove_leftovers(root: Path) -> None:
    """Removes what interrupted saves left. Call it only while no save is in progress."""
    for leftover in root.glob(f"{ASIDE}*"):
        shutil.rmtree(leftover, ignore_errors=True)
