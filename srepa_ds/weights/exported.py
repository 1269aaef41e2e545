"""An exported model on disk: `model.safetensors` and `config.json` in one folder."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from srepa_ds.documents.json_reader import read_json
from srepa_ds.documents.safetensors_writer import in_file_order, write_safetensors
from srepa_ds.errors import CheckpointError, ConfigError, OutputError, listed
from srepa_ds.files import (
    PARTIAL,
    claimed,
    flush_to_disk,
    is_of_the_system,
    sha256_of,
    write_aside,
    writing,
)
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig
from srepa_ds.schema import Section, validated
from srepa_ds.weight_file import other_kind, plain_tensors, read_weight_file
from srepa_ds.weights.fit import model_of
from srepa_ds.weights.lazy import entries_of

FORMAT = "srepa_ds.model"
VERSION = 1
WEIGHTS = "model.safetensors"
DOCUMENT = "config.json"
CARD, PICTURE = "README.md", "samples.png"
"""What `srepa-ds export` writes beside a model for people who find it."""
# Files of an export that is under way or was killed; the last is safetensors' own.
_UNFINISHED = re.compile(rf"({WEIGHTS}|{DOCUMENT}|{CARD}|{PICTURE}){PARTIAL}|\.tmp\w{{6}}")
METADATA = {"format": "pt"}
"""What the weight file says of itself."""
_EXPORT_AGAIN = "make it again with `srepa-ds export CONFIG`"

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class ExportDocument:
    """What is said of a model's weights, of which the types are checked.

    By an export's `config.json`, a checkpoint, or the experiment that draws from a file.
    """

    path: Path
    """The file or folder that it comes from, or that it describes."""

    config: Mapping[str, Any]
    """The experiment's configuration, as a tree."""

    provenance: Mapping[str, Any]
    """Checkpoint, step and kind of weights."""

    sha256: str | None
    """Hash of the weight file; None in exports of the first release."""

    cure: str = _EXPORT_AGAIN
    """What to do about a configuration that cannot be used."""

    @property
    def weights(self) -> str:
        """The kind of weights: `master`, `ema` or another average."""
        return self.provenance["weights"]

    def section(self, schema: type[S], name: str) -> S:
        """Returns a section of the configuration; raises CheckpointError if it is invalid."""
        tree = _part(self.path, self.config, name, dict, of="its config")
        try:
            return validated(schema, tree, source=f"{self.path}: config.{name}")
        except ConfigError as error:
            raise CheckpointError(f"{error}\n{self.cure}") from error


@dataclass(frozen=True)
class ExportedModel:
    """A model read from a folder or a file, with its configuration and provenance."""

    model: SiT
    document: ExportDocument

    sha256: str
    """Hash of the weight file; of a checkpoint, of that which its export would have."""

    described: Mapping[str, Any] = field(default_factory=dict)
    """What the weights do not tell of the model, as JSON values, if nothing beside them does."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The experiment's configuration, as a tree."""
        return self.document.config

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Checkpoint, step and kind of weights."""
        return self.document.provenance


def write_model(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """Writes an exported model; an earlier one in `folder`, which may be a link, is replaced.

    Both files are complete before either takes its name, so an earlier model stays whole up to a
    kill between two renames, which readers recognise. Raises OutputError if `folder` holds anything
    else, cannot be written to, or another process exports into it; an earlier model is then still
    there, and nothing is left of the attempt.
    """
    cure = "choose another export.folder, or fix its permissions and make room"
    with writing(f"the model to {folder}", cure=cure):
        # Before the claim: whoever holds a folder with other files does not export into it.
        _own_names(folder)
    otherwise = ", or choose another export.folder"
    with claimed(folder, doing="exporting into", cure=cure, otherwise=otherwise):
        with writing(f"the model to {folder}", cure=cure):
            _refuse_foreign(folder)
            _write(folder, tensors, {"provenance": provenance, "config": config})
            _remove_leftovers(folder)


def _write(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    entries = in_file_order(entries_of(tensors, torch.float32))
    document = folder / (DOCUMENT + PARTIAL)

    def both(aside: Path) -> None:
        # No provenance here: sample sets identify their model by the hash of this file.
        sha256 = write_safetensors(aside, entries, tensors.__getitem__, METADATA)
        mark = {"format": FORMAT, "version": VERSION, "sha256": sha256}
        # A new file: what lies there may be a link that leads elsewhere.
        document.unlink(missing_ok=True)
        document.write_text(json.dumps({**mark, **facts}, indent=2) + "\n", encoding="utf-8")
        flush_to_disk(document)

    try:
        write_aside(folder / WEIGHTS, both)
    except BaseException:
        document.unlink(missing_ok=True)
        raise
    os.replace(document, folder / DOCUMENT)
    flush_to_disk(folder)


def _refuse_foreign(folder: Path) -> None:
    """Raises OutputError unless `folder` is absent, empty, or holds an exported model alone."""
    names = {name for name in _own_names(folder) if not _UNFINISHED.fullmatch(name)}
    # Only a kill between the renames leaves weights beside a document without its name.
    mark = DOCUMENT if DOCUMENT in names else DOCUMENT + PARTIAL
    if names and not _is_document(folder / mark):
        raise _foreign(folder, names)


def _own_names(folder: Path) -> set[str]:
    """Returns the names of the files in `folder`; raises OutputError if one is not of a model."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    names = {name for name in names if _UNFINISHED.fullmatch(name) or not is_of_the_system(name)}
    if any(not _UNFINISHED.fullmatch(name) for name in names - {WEIGHTS, DOCUMENT, CARD, PICTURE}):
        raise _foreign(folder, names)
    return names


def _foreign(folder: Path, names: set[str]) -> OutputError:
    return OutputError(
        f"{folder} holds files other than an exported model ({listed(sorted(names), most=3)}); "
        "choose another export.folder"
    )


def _is_document(path: Path) -> bool:
    try:
        return read_json(path)["format"] == FORMAT
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return False


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed exports left in `folder`, and what those of the first release left."""
    for left in [path for path in folder.iterdir() if _UNFINISHED.fullmatch(path.name)]:
        left.unlink(missing_ok=True)
    place = folder.absolute()
    for ending in ("writing", "replaced") if place.name else ():
        left = place.parent / f".{place.name}.{ending}"
        # Not Path.is_dir, for which a name that is too long is an error.
        if os.path.isdir(left) and {path.name for path in left.iterdir()} <= {WEIGHTS, DOCUMENT}:
            shutil.rmtree(left, ignore_errors=True)


def exported_step(folder: Path) -> int | None:
    """Returns the training step of the exported model in `folder`, or None if there is none."""
    try:
        return read_document(folder).provenance["step"]
    except CheckpointError:
        return None


def read_document(folder: Path) -> ExportDocument:
    """Returns what `folder` says of its exported model, without reading the weights.

    Raises CheckpointError if there is no model, or for lacking keys and wrong types.
    """
    path = folder / DOCUMENT
    try:
        found = read_json(path)
    except FileNotFoundError as error:
        if (folder / (DOCUMENT + PARTIAL)).exists():
            raise _interrupted(folder) from error
        raise _without_model(folder, f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise _without_model(folder, f"{path}: {reason}") from error
    if not isinstance(found, dict):
        raise _of_no_model(path, "it is no JSON object")
    mark = (_part(path, found, "format", str), _part(path, found, "version", int))
    if mark != (FORMAT, VERSION):
        raise CheckpointError(f"{path} is of format {mark}, not {(FORMAT, VERSION)}")
    provenance = _part(path, found, "provenance", dict)
    _part(path, provenance, "weights", str)
    _part(path, provenance, "step", int)
    config = _part(path, found, "config", dict)
    sha256 = _part(path, found, "sha256", str) if "sha256" in found else None
    return ExportDocument(path, config, provenance, sha256)


def _part(path: Path, tree: Mapping[str, Any], key: str, kind: type, of: str = "it") -> Any:
    """Returns an entry of a document; raises CheckpointError unless it is there and of `kind`."""
    if key not in tree:
        raise _of_no_model(path, f"{of} lacks '{key}'")
    value = tree[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        names = {str: "text", int: "a whole number", dict: "an object"}
        raise _of_no_model(path, f"'{key}' is not {names[kind]}")
    return value


def checked_document(folder: Path) -> tuple[ExportDocument, str]:
    """Returns what `folder` says of its exported model, and the hash of its weights.

    Raises CheckpointError as `read_document` does, and if the weights are missing or are not those
    that were exported.
    """
    document = read_document(folder)
    try:
        found = sha256_of(folder / WEIGHTS)
    except OSError as error:
        raise _without_model(folder, f"{folder / WEIGHTS}: {error.strerror}") from error
    if document.sha256 is not None and document.sha256 != found:
        if (folder / (DOCUMENT + PARTIAL)).exists():
            raise _interrupted(folder)
        if kind := other_kind(folder / WEIGHTS):
            raise _without_model(folder, f"{folder / WEIGHTS}: {kind}")
        raise CheckpointError(
            f"{folder / WEIGHTS} has changed since it was exported (its sha256 is {found[:12]}..., "
            f"not {document.sha256[:12]}...); {_EXPORT_AGAIN}"
        )
    return document, found


def check_export(folder: Path) -> None:
    """Checks that `folder` holds an exported model, whole and as it was exported.

    Raises CheckpointError that says what is missing, changed or does not fit.
    """
    read_model(folder)


def read_model(folder: Path) -> ExportedModel:
    """Returns the exported model of `folder`, on the CPU, in evaluation mode.

    Raises CheckpointError that says what is missing, changed or does not fit.
    """
    document, sha256 = checked_document(folder)
    path = folder / WEIGHTS
    try:
        found = read_weight_file(path, named=str(path), setting="the folder", fault=CheckpointError)
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        tensors = plain_tensors(tensors, path, named=str(path), fault=CheckpointError)
    except CheckpointError as error:
        raise _without_model(folder, str(error)) from error
    config = document.section(SiTConfig, "model")
    return ExportedModel(model_of(config, tensors, path, cure=_EXPORT_AGAIN), document, sha256)


def _without_model(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} does not hold an exported model ({reason}); make one with "
        "`srepa-ds export CONFIG`"
    )


def _of_no_model(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} does not describe a model: {reason}; {_EXPORT_AGAIN}")


def _interrupted(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder} holds an interrupted export, or one that another process has not finished; wait "
        f"for it, or {_EXPORT_AGAIN}"
    )
