"""An exported model on disk: weights and `config.json` in one folder."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from srepa_ds.documents.json_reader import read_json
from srepa_ds.documents.safetensors_writer import TensorEntry, write_safetensors
from srepa_ds.errors import CheckpointError, ConfigError
from srepa_ds.files import (
    PARTIAL,
    flush_to_disk,
    is_plain_name,
    sha256_of,
    write_all_aside,
)
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig
from srepa_ds.schema import Section, validated
from srepa_ds.weight_file import other_kind, plain_tensors, read_weight_file
from srepa_ds.weights.fit import model_of
from srepa_ds.weights.lazy import entries_of, rounded
from srepa_ds.weights.ownership import CARD as CARD
from srepa_ds.weights.ownership import DOCUMENT as DOCUMENT
from srepa_ds.weights.ownership import FORMAT, room_for_model
from srepa_ds.weights.ownership import PICTURE as PICTURE
from srepa_ds.weights.weight_files import (
    INDEX,
    hash_of_files,
    index_of,
    is_weight_file,
    split_into_files,
)
from srepa_ds.weights.weight_files import METADATA as METADATA
from srepa_ds.weights.weight_files import WEIGHTS as WEIGHTS

VERSION, SHARDED = 1, 2
"""Versions of the format: with one weight file, and with several and an index."""

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
    """Hash of the weights; None in exports of the first release."""

    cure: str = _EXPORT_AGAIN
    """What to do about a configuration that cannot be used."""

    files: Mapping[str, str] = field(default_factory=dict)
    """Hashes of an export's files by name, if there are several: shards and their index."""

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
    """Hash of the weights; of a checkpoint, that which its export would have."""

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
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | None = None,
    replace: bool = False,
) -> None:
    """Writes an exported model; an earlier one of the run in `folder` is replaced.

    `folder` may be a link. A model of another run or format is replaced only with `replace`. All
    files are complete before the first takes its name, so an earlier model stays whole up to a kill
    between two renames, which readers recognise. Raises OutputError if `folder` holds anything
    else, cannot be written to, or another process exports into it, and CheckpointError if a value
    is beyond `dtype`; an earlier model is then still there, and nothing is left of the attempt.
    """
    files = split_into_files(entries_of(tensors, dtype), max_shard_size)
    values = rounded(tensors, dtype)
    facts = {"provenance": provenance, "config": config}
    with room_for_model(folder, format="srepa_ds", config=config, replace=replace):
        _write(folder, files, values, facts)


def _write(
    folder: Path,
    files: Mapping[str, Sequence[TensorEntry]],
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> None:
    hashes: dict[str, str] = {}

    def write_weights(name: str, aside: Path) -> None:
        # No provenance here: sample sets identify their model by the hash of these files.
        hashes[name] = write_safetensors(aside, files[name], tensors.__getitem__, METADATA)

    def write_index(aside: Path) -> None:
        aside.write_text(json.dumps(index_of(files), indent=2) + "\n", encoding="utf-8")
        hashes[INDEX] = sha256_of(aside)

    def write_document(aside: Path) -> None:
        mark = {"format": FORMAT, "version": VERSION, "sha256": hash_of_files(hashes)}
        if is_sharded:
            mark |= {"version": SHARDED, "files": hashes}
        aside.write_text(json.dumps({**mark, **facts}, indent=2) + "\n", encoding="utf-8")

    is_sharded = list(files) != [WEIGHTS]
    writers = {folder / name: partial(write_weights, name) for name in files}
    writers |= {folder / INDEX: write_index} if is_sharded else {}
    write_all_aside({**writers, folder / DOCUMENT: write_document})
    for path in folder.iterdir():
        if path.name not in hashes and (is_weight_file(path.name) or path.name == INDEX):
            path.unlink()
    flush_to_disk(folder)


def holds_export(folder: Path) -> bool:
    """Returns whether `folder` has weight files of an exported model, or their index."""
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError:
        return False
    return any(name == INDEX or is_weight_file(name) for name in names)


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
    if mark not in ((FORMAT, VERSION), (FORMAT, SHARDED)):
        raise CheckpointError(f"{path} is of format {mark}, not {(FORMAT, SHARDED)}")
    provenance = _part(path, found, "provenance", dict)
    _part(path, provenance, "weights", str)
    _part(path, provenance, "step", int)
    config = _part(path, found, "config", dict)
    sha256 = _part(path, found, "sha256", str) if "sha256" in found else None
    files = _files_of(path, found) if mark == (FORMAT, SHARDED) else {}
    return ExportDocument(path, config, provenance, sha256, files=files)


def _files_of(path: Path, tree: Mapping[str, Any]) -> dict[str, str]:
    """Returns the hashes of shards and index; raises CheckpointError unless all lie beside them."""
    files = _part(path, tree, "files", dict)
    for name, sha256 in files.items():
        if not is_plain_name(name) or not (is_weight_file(name) or name == INDEX):
            raise _of_no_model(path, f"it names {name!r}, which is no weight file in its folder")
        if not isinstance(sha256, str):
            raise _of_no_model(path, f"the hash of '{name}' is not text")
    if not any(map(is_weight_file, files)):
        raise _of_no_model(path, "it names no weight file")
    if hash_of_files(files) != _part(path, tree, "sha256", str):
        raise _of_no_model(path, "its hash is not that of its files")
    return files


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
    expected = document.files or {WEIGHTS: document.sha256}
    found = {name: _checked_hash(folder / name, sha256) for name, sha256 in expected.items()}
    return document, hash_of_files(found)


def _checked_hash(path: Path, expected: str | None) -> str:
    """Returns the hash of a file; raises CheckpointError unless it is `expected`, if that is known.

    A file that cannot be read, or is of another kind, is named as such.
    """
    folder = path.parent
    try:
        found = sha256_of(path)
    except OSError as error:
        if (folder / (DOCUMENT + PARTIAL)).exists():
            raise _interrupted(folder) from error
        raise _without_model(folder, f"{path}: {error.strerror}") from error
    if expected is None or found == expected:
        return found
    if (folder / (DOCUMENT + PARTIAL)).exists():
        raise _interrupted(folder)
    if path.name != INDEX and (kind := other_kind(path)):
        raise _without_model(folder, f"{path}: {kind}")
    raise CheckpointError(
        f"{path} has changed since it was exported (its sha256 is {found[:12]}..., not "
        f"{expected[:12]}...); {_EXPORT_AGAIN}"
    )


def weight_files(document: ExportDocument) -> list[Path]:
    """Returns the weight files of an export, of which there may be several."""
    names = filter(is_weight_file, document.files) if document.files else [WEIGHTS]
    return [document.path.parent / name for name in names]


def stored_tensors(document: ExportDocument) -> dict[str, Tensor]:
    """Returns the tensors of an export under official names, mapped from its files.

    `checked_document` tells whether the files are those that were exported. Raises CheckpointError
    if one cannot be read.
    """
    return dict(item for path in weight_files(document) for item in _tensors_in(path))


def _tensors_in(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        found = read_weight_file(path, named=str(path), setting="the folder", fault=CheckpointError)
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        yield from plain_tensors(tensors, path, named=str(path), fault=CheckpointError).items()
    except CheckpointError as error:
        raise _without_model(path.parent, str(error)) from error


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
    tensors = stored_tensors(document)
    config = document.section(SiTConfig, "model")
    place = folder if document.files else folder / WEIGHTS
    return ExportedModel(model_of(config, tensors, place, cure=_EXPORT_AGAIN), document, sha256)


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
