"""`srepa-ds verify PATH`: reads all of a folder and compares it with what was written."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from srepa_ds.checkpoint.folder import fault_of, steps_in
from srepa_ds.checkpoint.manifest import MANIFEST
from srepa_ds.console import steps_shown
from srepa_ds.data.contents import IndexedFile, check_contents
from srepa_ds.data.index_document import INDEX_NAME
from srepa_ds.data.prepared_folder import MARKER_NAME
from srepa_ds.data.shard_file import (
    check_labels,
    check_shard,
    indexed_shards,
    labels_of,
    shard_name,
)
from srepa_ds.data.shard_index import ShardEntry, ShardIndex, read_index
from srepa_ds.data.token_index import (
    TOKEN_FORMAT,
    TokenFileEntry,
    TokenIndex,
    is_finished,
    read_token_index,
    token_file_name,
)
from srepa_ds.data.token_store import TokenStore, check_token_file, indexed_tokens
from srepa_ds.documents.json_reader import read_json
from srepa_ds.encoders.teacher_folder import REPORT_NAME, WEIGHTS_NAME, check_teacher
from srepa_ds.errors import CheckpointError, DataError, SRepaError
from srepa_ds.run_folder import RunFolder
from srepa_ds.training.stored_teachers import STORES
from srepa_ds.weights.exported import DOCUMENT, WEIGHTS, check_export


class _Part(NamedTuple):
    """Files that are checked together."""

    files: tuple[Path, ...]
    check: Callable[[], object]
    """Raises SRepaError if they are not as they were written."""


def verify(path: Path) -> str:
    """Returns how much was found to be as written; reads every file in full.

    Raises DataError that lists every fault, or says that the folder holds nothing to compare.
    """
    try:
        parts = _parts_below(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; give a folder to check") from error
    if not parts:
        raise DataError(
            f"{path}: holds nothing that can be checked; give the folder of a data set, of stored "
            "tokens, of a run, of an exported model or of a teacher"
        )
    # Files of a damaged store may fail in two checks alike.
    faults = dict.fromkeys(_faults(parts))
    files = dict.fromkeys(file for part in parts for file in part.files)
    if faults:
        count = f"{len(faults)} fault{'s' if len(faults) != 1 else ''}"
        lines = [fault.replace("\n", "\n    ") for fault in faults]
        raise DataError("\n  ".join([f"{path}: {count} in {len(files)} files", *lines]))
    size = sum(file.stat().st_size for file in files)
    amount = f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"
    return f"{len(files)} files, {amount}: all as written"


def _faults(parts: list[_Part]) -> Iterator[str]:
    for part in steps_shown(parts, total=len(parts), what="checked", is_main=True):
        try:
            part.check()
        except SRepaError as error:
            yield str(error)
        except OSError as error:
            yield f"{error.filename or part.files[0]}: {error.strerror or error}"


def _parts_below(folder: Path) -> list[_Part]:
    """Returns the parts of a folder, or of the data sets that it holds; raises OSError."""
    parts = _parts_of(folder)
    if parts:
        return parts
    below = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    return [part for path in below for part in _of_samples(path)]


def _parts_of(folder: Path) -> list[_Part]:
    """Returns the parts of a folder of a known kind, none for any other; raises OSError."""
    names, run = {path.name for path in folder.iterdir()}, RunFolder(folder)
    if samples := _of_samples(folder):
        return samples
    if run.checkpoints.name in names:
        checkpoints = [_of_checkpoint(path) for path in steps_in(run.checkpoints)]
        return checkpoints + (_of_export(run.export) if run.export.is_dir() else [])
    if MANIFEST in names:
        return [_of_checkpoint(folder)]
    if REPORT_NAME in names:
        return [
            _Part((folder / WEIGHTS_NAME, folder / REPORT_NAME), partial(check_teacher, folder))
        ]
    if {DOCUMENT, WEIGHTS} <= names:
        return _of_export(folder)
    return [_of_checkpoint(path) for path in steps_in(folder)]


def _of_samples(folder: Path) -> list[_Part]:
    """Returns the parts of a data set or a store, finished or not; none for any other folder."""
    names = {path.name for path in folder.iterdir()}
    if _format_of(folder) == TOKEN_FORMAT or token_file_name(0) in names:
        return _of_store(folder)
    return _of_data(folder) if {INDEX_NAME, MARKER_NAME, shard_name(0)} & names else []


def _format_of(folder: Path) -> object:
    try:
        return read_json(folder / INDEX_NAME)["format"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _of_data(folder: Path) -> list[_Part]:
    """Returns the shards of a data set, and the finished stores beside them."""
    try:
        index = read_index(folder)
    except SRepaError as error:
        return [_failed(folder / INDEX_NAME, error)]
    files = indexed_shards(folder, index)
    parts = [
        _Part((file.path,), partial(_check_shard, folder, index, entry, file))
        for entry, file in zip(index.shards, files, strict=True)
    ]
    for store in filter(is_finished, sorted((folder / STORES).glob("*"))):
        parts += _of_store(store)
        parts.append(_Part((), partial(_check_fits, store, index, folder)))
    return [_Part((folder / INDEX_NAME,), lambda: None), *parts]


def _check_shard(folder: Path, index: ShardIndex, entry: ShardEntry, indexed: IndexedFile) -> None:
    file = check_shard(folder, index, entry)
    check_contents(indexed)
    check_labels(file.path, labels_of(file, entry.num_samples), num_classes=index.num_classes)


def _of_store(folder: Path) -> list[_Part]:
    try:
        index = read_token_index(folder)
    except SRepaError as error:
        return [_failed(folder / INDEX_NAME, error)]
    files = indexed_tokens(folder, index)
    parts = [
        _Part((file.path,), partial(_check_tokens, folder, index, entry, file))
        for entry, file in zip(index.files, files, strict=True)
    ]
    return [_Part((folder / INDEX_NAME,), lambda: None), *parts]


def _check_tokens(
    folder: Path, index: TokenIndex, entry: TokenFileEntry, file: IndexedFile
) -> None:
    check_token_file(folder, index, entry)
    check_contents(file)


def _check_fits(store: Path, index: ShardIndex, folder: Path) -> None:
    TokenStore(store).check_fits(index, folder)


def _of_checkpoint(folder: Path) -> _Part:
    return _Part(_files_in(folder), partial(_check_checkpoint, folder))


def _check_checkpoint(folder: Path) -> None:
    fault = fault_of(folder)
    # A run that goes on may have deleted it in the meantime.
    if fault is not None and folder.is_dir():
        raise CheckpointError(f"{folder}: {fault}; restore it, or delete it")


def _of_export(folder: Path) -> list[_Part]:
    return [_Part(_files_in(folder), partial(check_export, folder))]


def _files_in(folder: Path) -> tuple[Path, ...]:
    return tuple(path for path in sorted(folder.iterdir()) if path.is_file())


def _failed(path: Path, error: SRepaError) -> _Part:
    def fail() -> None:
        raise error

    return _Part((path,), fail)
