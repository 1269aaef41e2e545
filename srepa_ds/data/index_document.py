"""Reads the JSON index of a folder; it is written last, so a folder without one is unfinished."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator

from srepa_ds.documents.json_reader import read_json
from srepa_ds.errors import ConfigError, DataError, listed
from srepa_ds.files import is_plain_name
from srepa_ds.schema import Section, validated

Index = TypeVar("Index", bound=Section)
INDEX_NAME = "index.json"


def _check_plain(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError(f"{name!r} is not the name of a file in this folder")
    return name


FileName = Annotated[str, AfterValidator(_check_plain)]
"""The name of a file beside the index. A path could lead to any file of the machine."""


def read_index_document(
    folder: Path,
    schema: type[Index],
    *,
    format_name: str,
    versions: Collection[int],
    missing: str,
    again: str,
) -> Index:
    """Returns the index of `folder`.

    Raises DataError if it is missing, unreadable, or not of this format and these versions;
    `missing` says what a missing index means and how to get one, `again` is the cure for a faulty
    one.
    """
    path = folder / INDEX_NAME
    try:
        tree = read_json(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing, so {missing}") from error
    except PermissionError as error:
        raise DataError(f"{path}: {error.strerror}; make it readable") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); {again}") from error
    found = tree.get("format") if isinstance(tree, dict) else type(tree).__name__
    if found != format_name:
        raise DataError(f"{path}: expected an index of format '{format_name}', found {found!r}")
    if tree.get("version") not in versions:
        raise DataError(
            f"{path}: expected version {listed(map(str, versions), ' or ')} of the format, found "
            f"{tree.get('version')!r}; {again} with this version of srepa-ds"
        )
    try:
        return validated(schema, tree, source=str(path))
    except ConfigError as error:
        raise DataError(f"{error}\n{again}") from error


def check_different(path: Path, names: Sequence[str], *, again: str) -> None:
    """Checks that the index at `path` names each file once; raises DataError."""
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise DataError(f"{path}: names {listed(twins)} more than once; {again}")
