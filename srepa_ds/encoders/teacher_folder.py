"""The folder of a teacher that `srepa-ds teacher` trained: weights, then a report."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from srepa_ds import __version__, files
from srepa_ds.documents.json_reader import read_json
from srepa_ds.errors import DataError, OutputError
from srepa_ds.files import PARTIAL, is_of_the_system, sha256_of, write_aside, writing

WEIGHTS_NAME = "model.safetensors"
REPORT_NAME = "teacher.json"
_CURE = "choose a folder you may write to, with free space"
_OWN_NAMES = {WEIGHTS_NAME, REPORT_NAME, WEIGHTS_NAME + PARTIAL, REPORT_NAME + PARTIAL}


def finished_accuracy(folder: Path, identity: dict[str, Any]) -> float | None:
    """Returns the held-out accuracy of the teacher in `folder`, or None if it must be trained.

    `identity` is everything that decides the weights. Raises OutputError if the folder holds
    another teacher or an unreadable report.
    """
    path = folder / REPORT_NAME
    if not path.is_file():
        return None
    try:
        report = read_json(path)
        found, accuracy = report["identity"], float(report["heldout_accuracy"])
        if not isinstance(found, dict):
            raise TypeError("its identity is not an object")
        expected_hash = str(report["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{path}: not the report of a teacher ({error!r}); delete {folder}"
        ) from error
    names = sorted({*found, *identity})
    differing = [name for name in names if found.get(name) != identity.get(name)]
    if differing:
        raise OutputError(
            f"{folder}: holds a teacher made with other settings ({', '.join(differing)} differ); "
            "choose another output or delete it"
        )
    weights = folder / WEIGHTS_NAME
    return accuracy if weights.is_file() and sha256_of(weights) == expected_hash else None


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes `folder` and keeps other processes out of it; removes it if it stays empty.

    Raises OutputError if it cannot be written to, if it holds files that are not a teacher's, or if
    another process trains a teacher there.
    """
    otherwise = ", or choose another output"
    with files.claimed(folder, doing="training a teacher in", cure=_CURE, otherwise=otherwise):
        with writing(folder, cure=_CURE):
            _check_own(folder)
        yield


def _check_own(folder: Path) -> None:
    """Raises OutputError if `folder` holds foreign files, OSError if it cannot be written to."""
    names = {path.name for path in folder.iterdir()} - _OWN_NAMES
    foreign = sorted(name for name in names if not is_of_the_system(name))
    probe = folder / (REPORT_NAME + PARTIAL)
    probe.touch()
    probe.unlink()
    if foreign:
        raise OutputError(f"{folder}: not empty (it holds {foreign[0]}); choose an empty folder")


def check_reported(weights: Path, sha256: str) -> None:
    """Checks the hash of a weights file against the report beside it, if there is one.

    Raises DataError if the report gives another hash.
    """
    if weights.name != WEIGHTS_NAME:
        return
    try:
        reported = read_json(weights.with_name(REPORT_NAME))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if reported != sha256:
        raise DataError(
            f"{weights}: contents changed since it was written (sha256 {sha256}, {REPORT_NAME} "
            f"says {reported}); restore it, or delete {weights.parent} and train the teacher again "
            "with `srepa-ds teacher CONFIG`"
        )


def check_teacher(folder: Path) -> None:
    """Compares the weights in `folder` with the report; raises DataError if they differ."""
    weights, report = folder / WEIGHTS_NAME, folder / REPORT_NAME
    try:
        str(read_json(report)["sha256"])
        found = sha256_of(weights)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: {WEIGHTS_NAME} and {REPORT_NAME} cannot be compared ({error!r}); delete "
            "the folder and train the teacher again with `srepa-ds teacher CONFIG`"
        ) from error
    check_reported(weights, found)


def save(folder: Path, encoder: nn.Module, facts: dict[str, Any]) -> None:
    """Writes the weights of `encoder` in timm's names, then `facts` with hash and versions.

    Raises OutputError, and then removes the new files.
    """
    weights, report = folder / WEIGHTS_NAME, folder / REPORT_NAME
    state = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    versions = {
        "srepa_ds": __version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
    }
    try:
        with writing(folder, cure=_CURE):
            report.unlink(missing_ok=True)
            write_aside(weights, lambda aside: save_file(state, aside))
            contents = {**facts, "sha256": sha256_of(weights), "versions": versions}
            text = json.dumps(contents, indent=1) + "\n"
            write_aside(report, lambda aside: aside.write_text(text, encoding="utf-8"))
    except OutputError:
        weights.unlink(missing_ok=True)
        raise
