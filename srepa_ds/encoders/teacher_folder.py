"""The folder of a trained teacher: its weights, and a report that is written last."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from srepa_ds import __version__
from srepa_ds.errors import OutputError
from srepa_ds.files import PARTIAL, make_folder, remove_empty, sha256_of, write_aside

WEIGHTS_NAME = "model.safetensors"
REPORT_NAME = "teacher.json"
_OWN_NAMES = {WEIGHTS_NAME, REPORT_NAME, WEIGHTS_NAME + PARTIAL, REPORT_NAME + PARTIAL}


def finished_accuracy(folder: Path, identity: dict[str, Any]) -> float | None:
    """Returns the held-out accuracy of the teacher in `folder`, or None if it must be trained.

    Raises OutputError if the folder holds another teacher or anything foreign.
    """
    path = folder / REPORT_NAME
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        found, accuracy = dict(report["identity"]), float(report["heldout_accuracy"])
        expected_hash = str(report["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path}: no report of a teacher ({error!r}); delete {folder}") from error
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
    """Makes `folder` and checks that it can be written to; an exception leaves no new folder.

    Raises OutputError if it cannot, or if it holds files that are not a teacher's.
    """
    probe = folder / (REPORT_NAME + PARTIAL)
    made: list[Path] = []
    try:
        made = make_folder(folder)
        foreign = sorted({path.name for path in folder.iterdir()} - _OWN_NAMES)
        probe.touch()
        probe.unlink()
    except OSError as error:
        remove_empty(made)
        raise _unwritable(folder, error) from error
    if foreign:
        raise OutputError(f"{folder}: not empty (it holds {foreign[0]}); choose an empty folder")
    try:
        yield
    except BaseException:
        remove_empty(made)
        raise


def save(folder: Path, encoder: nn.Module, facts: dict[str, Any]) -> None:
    """Writes the weights of `encoder` as timm names them, then `facts` with hash and versions.

    Raises OutputError, with the new files removed.
    """
    weights, report = folder / WEIGHTS_NAME, folder / REPORT_NAME
    state = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    try:
        report.unlink(missing_ok=True)
        write_aside(weights, lambda aside: save_file(state, aside))
        versions = {
            "srepa_ds": __version__,
            "torch": str(torch.__version__),
            "timm": timm.__version__,
        }
        told = {**facts, "sha256": sha256_of(weights), "versions": versions}
        text = json.dumps(told, indent=1) + "\n"
        write_aside(report, lambda aside: aside.write_text(text, encoding="utf-8"))
    except (OSError, SafetensorError) as error:
        weights.unlink(missing_ok=True)
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or error
    return OutputError(
        f"{folder}: cannot be written ({reason}); choose a folder you may write to, with free space"
    )
