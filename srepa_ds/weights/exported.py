"""An exported model on disk: `model.safetensors` and `config.json` in one folder."""

import json
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from srepa_ds.errors import CheckpointError, ConfigError, OutputError
from srepa_ds.files import sha256_of
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig
from srepa_ds.schema import replaced, validated
from srepa_ds.trees import read_json

FORMAT = "srepa_ds.model"
VERSION = 1
WEIGHTS = "model.safetensors"
DOCUMENT = "config.json"
# Weights that sampling does not need.
_TRAINING_ONLY = ("projectors.",)


@dataclass(frozen=True)
class ExportedModel:
    """A model read from a folder, with its configuration and provenance."""

    model: SiT
    config: Mapping[str, Any]
    """The experiment's configuration, as a tree."""

    provenance: Mapping[str, Any]
    """Checkpoint, step and kind of weights."""

    sha256: str
    """Hash of the weight file."""


def write_model(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """Writes an exported model atomically; an earlier one in `folder` is replaced.

    Raises OutputError if `folder` holds anything else or cannot be written; an earlier model is
    then still there, and nothing is left of the attempt.
    """
    folder = folder.absolute()
    aside = folder.with_name(f".{folder.name}.writing")
    document = {
        "format": FORMAT,
        "version": VERSION,
        "provenance": provenance,
        "config": config,
    }
    try:
        _refuse_foreign(folder)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        # No provenance here: safetensors writes several keys in an order that changes from run to
        # run, and sample sets identify their model by the hash of this file.
        save_file(contiguous, aside / WEIGHTS, {"format": "pt"})
        (aside / DOCUMENT).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        # safetensors makes its files private; give the weights the document's permissions.
        (aside / WEIGHTS).chmod(stat.S_IMODE((aside / DOCUMENT).stat().st_mode))
        _replace(folder, aside)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"cannot write the model to {folder}: {reason}") from error


def _refuse_foreign(folder: Path) -> None:
    """Raises OutputError unless `folder` is absent, empty, or holds an exported model alone."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if names and not (names <= {WEIGHTS, DOCUMENT} and _is_document(folder / DOCUMENT)):
        raise OutputError(
            f"{folder} holds files other than an exported model ({', '.join(sorted(names)[:3])}); "
            "choose another export.folder"
        )


def _is_document(path: Path) -> bool:
    try:
        document = read_json(path)
        return document["format"] == FORMAT
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _replace(folder: Path, aside: Path) -> None:
    """Moves `aside` to `folder`, and then deletes the replaced folder; restores it on failure."""
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    try:
        aside.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def exported_step(folder: Path) -> int | None:
    """Returns the training step of the exported model in `folder`, or None if there is none."""
    try:
        step = read_json(folder / DOCUMENT)["provenance"]["step"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None


def read_model(folder: Path) -> ExportedModel:
    """Returns the exported model of `folder`, on the CPU, in evaluation mode.

    Raises CheckpointError that says what is missing or does not fit.
    """
    try:
        document = read_json(folder / DOCUMENT)
        sha256 = sha256_of(folder / WEIGHTS)
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} does not hold an exported model ({error}); make one with "
            "`srepa-ds export CONFIG`"
        ) from error
    try:
        mark, tree = (document["format"], document["version"]), document["config"]
        provenance, model_tree = document["provenance"], tree["model"]
    except (TypeError, KeyError) as error:
        raise CheckpointError(
            f"{folder / DOCUMENT} does not describe a model: it lacks {error}"
        ) from error
    if mark != (FORMAT, VERSION):
        raise CheckpointError(f"{folder / DOCUMENT} is of format {mark}, not {(FORMAT, VERSION)}")
    try:
        config = validated(SiTConfig, model_tree, source=str(folder / DOCUMENT))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    # The attention backend is not part of a model: the one that trained it may not run here.
    model = SiT(replaced(config, attention="sdpa"), None)
    wanted = {k: v for k, v in tensors.items() if not k.startswith(_TRAINING_ONLY)}
    try:
        model.load_state_dict(wanted)
    except RuntimeError as error:
        raise CheckpointError(f"{folder / WEIGHTS} does not fit its config: {error}") from error
    return ExportedModel(model.eval().requires_grad_(False), tree, provenance, sha256)


def check_export(folder: Path) -> None:
    """Checks that the weights in `folder` are the exported ones; raises CheckpointError."""
    found = read_model(folder).sha256
    wanted = read_json(folder / DOCUMENT).get("sha256", found)
    if found != wanted:
        raise CheckpointError(
            f"{folder / WEIGHTS}: contents changed since it was written (sha256 {found}, "
            f"{DOCUMENT} says {wanted}); export it again"
        )
