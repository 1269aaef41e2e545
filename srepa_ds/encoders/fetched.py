"""The folder of what `srepa-ds fetch` brought, and `fetched.json`, which says what that is.

Every program that uses a file compares it with `fetched.json`: the sizes each time, the contents
once per process.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from srepa_ds.documents.json_reader import read_json
from srepa_ds.encoders.publications import Published
from srepa_ds.errors import ConfigError, DataError
from srepa_ds.files import is_plain_name, reason_of, sha256_of, write_aside
from srepa_ds.schema import Section, validated

FOLDER_VARIABLE = "SREPA_FETCHED"
DEFAULT_FOLDER = "fetched"
DOCUMENT_NAME = "fetched.json"
FETCH_AGAIN = "run `srepa-ds fetch CONFIG` where there is a network"

_FORMAT = "srepa_ds.fetched"


def _plain(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError(f"{name!r} is not the name of a file in this folder")
    return name


PlainName = Annotated[str, AfterValidator(_plain)]
"""The name of a file or folder beside others. A path could lead to any file of the machine."""


def _plain_path(name: str) -> str:
    if not all(map(is_plain_name, name.split("/"))):
        raise ValueError(f"{name!r} is not the name of a file in this folder, or in one inside it")
    return name


PlainPath = Annotated[str, AfterValidator(_plain_path)]
"""The name of a file, or of one in a folder, beside others; it cannot lead elsewhere."""


class FetchedFile(Section):
    """Size and contents of a file."""

    num_bytes: int = Field(ge=0)
    """The size in bytes."""
    sha256: str
    """In hexadecimal."""


class Fetched(Section):
    """Files that were fetched together, into one folder."""

    source: str
    """Address of the file, or of the repository."""
    revision: str | None = None
    """The commit of the repository."""
    when: str
    """The time, in ISO 8601."""
    files: dict[PlainPath, FetchedFile]
    """The files by name; with the folder if they lie in one."""


class FetchedDocument(Section):
    """`fetched.json`."""

    format: Literal["srepa_ds.fetched"] = _FORMAT
    """Tells this file from others."""
    version: Literal[1, 2] = 2
    """Of the format. Version 1 has no files in folders."""
    fetched: dict[PlainName, Fetched] = {}
    """By name of the folder."""


def fetched_folder() -> Path:
    """Returns the folder of what was fetched: `$SREPA_FETCHED`, or `fetched` where it was run."""
    return Path(os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER).expanduser()


def read_fetched(folder: Path) -> FetchedDocument:
    """Returns `fetched.json` of `folder`, empty if there is none; raises DataError."""
    path = folder / DOCUMENT_NAME
    try:
        return validated(FetchedDocument, read_json(path), source=str(path))
    except (FileNotFoundError, NotADirectoryError):
        return FetchedDocument()
    except (OSError, ValueError, AttributeError, TypeError, ConfigError) as error:
        reason = str(error) if isinstance(error, ConfigError) else f"{path}: {reason_of(error)}"
        raise DataError(f"{reason}\nrestore it, or delete {folder} and {FETCH_AGAIN}") from error


def write_fetched(folder: Path, document: FetchedDocument) -> None:
    """Writes `fetched.json` in `folder`; raises OSError."""
    text = json.dumps(document.model_dump(mode="json"), indent=1) + "\n"
    write_aside(folder / DOCUMENT_NAME, lambda aside: aside.write_text(text, encoding="utf-8"))


def find_fetched(published: Published) -> Path | None:
    """Returns the folder with the files of `published`, None if they were not fetched.

    Raises DataError if a file is missing, or differs from `fetched.json`.
    """
    root = fetched_folder()
    entry = read_fetched(root).fetched.get(published.folder_name)
    if entry is None:
        return None
    folder = root / published.folder_name
    for name, file in entry.files.items():
        _check(folder / name, file)
    return folder


def _check(path: Path, expected: FetchedFile) -> None:
    """Compares a file's size, and its contents unless this process has; raises DataError."""
    try:
        found = path.stat().st_size
        if found != expected.num_bytes:
            raise DataError(
                f"{path}: has {found:,} bytes, and {expected.num_bytes:,} were fetched; "
                f"{FETCH_AGAIN}"
            )
        contents = sha256_once(path)
    except OSError as error:
        raise DataError(f"{path}: {reason_of(error)}; {FETCH_AGAIN}") from error
    if contents != expected.sha256:
        raise DataError(
            f"{path}: contents changed since they were fetched (sha256 {contents}, expected "
            f"{expected.sha256}); {FETCH_AGAIN}"
        )


def sha256_once(path: Path) -> str:
    """Returns the hash of a file, which this process reads once until it changes."""
    facts = path.stat()
    return _contents(path.absolute(), facts.st_ino, facts.st_mtime_ns)


@cache
def _contents(path: Path, inode: int, modified: int) -> str:
    return sha256_of(path)
