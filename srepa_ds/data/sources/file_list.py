"""The source `file_list`: a CSV or JSON-lines file of paths and labels."""

import csv
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from srepa_ds.data.sources.image_file import image_file
from srepa_ds.data.sources.listing import ListedSource, listed_by_label, reading
from srepa_ds.data.sources.source import SourceItem
from srepa_ds.documents.json_reader import parse_json
from srepa_ds.errors import DataError
from srepa_ds.schema import Section

_THREADS = 16
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


class FileListConfig(Section):
    """A list of image files and their labels."""

    kind: Literal["file_list"]
    """Labels are whole numbers; or names, of which the first in alphabetical order is label 0."""
    path: Path
    """A `.csv` file with a path and a label in each line, perhaps below a line with the names of
    the columns (`path`, `label`, and others that are left out); or a `.jsonl` file with an object
    `{"path": ..., "label": ...}` in each line."""
    root: Path | None = None
    """The folder that paths start from and stay in; without it, the folder of the list."""

    def opened(self) -> "FileList":
        """Returns the source; raises DataError if the list cannot be read or is empty."""
        return FileList(self.path, root=self.root)


class _Line(NamedTuple):
    """One line of the list."""

    number: int
    path: str
    label: int | str


class FileList(ListedSource):
    """Images named in a list, in its order."""

    def __init__(self, path: Path, *, root: Path | None = None):
        """Reads the list and the sizes of files; raises DataError."""
        self._root = os.path.realpath(path.parent if root is None else root)
        with reading(path, needs="a CSV or JSON-lines file"):
            lines = _lines(path)
        keys = _keys(path, lines)
        with ThreadPoolExecutor(_THREADS) as pool:
            sizes = list(pool.map(self._size, keys))
        try:
            labels = _labels(lines, is_csv=not _is_json(path))
            images, classes = listed_by_label(zip(keys, labels, sizes, strict=True))
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error
        super().__init__(path, images, classes)

    def item(self, index: int) -> SourceItem:
        """Returns one image, as the contents of its file; raises DataError."""
        place = os.path.join(self._root, self.key(index))
        real = os.path.realpath(place)
        if os.path.commonpath((self._root, real)) != self._root:
            raise DataError(f"is a link out of the folder {self._root}, to {real}")
        if os.path.exists(real) and not os.path.isfile(real):
            raise DataError(f"{place} is not a file")
        return SourceItem(image_file(Path(real), root=Path(self._root)))

    def _size(self, key: str) -> int:
        try:
            return os.stat(os.path.join(self._root, key)).st_size
        except OSError:
            # Reading it will say so, and may skip it.
            return -1


def _is_json(path: Path) -> bool:
    return path.suffix.lower() in _JSON_SUFFIXES


def _lines(path: Path) -> list[_Line]:
    """Returns the lines of a list; raises OSError and DataError."""
    try:
        # A spreadsheet may put a mark before the first character.
        with path.open(encoding="utf-8-sig", newline="") as file:
            found = list(_json_lines(file) if _is_json(path) else _csv_lines(file))
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path}: {error}; correct the list") from error
    if not found:
        raise DataError(f"{path}: lists no images")
    return found


def _csv_lines(file: Iterator[str]) -> Iterator[_Line]:
    """Yields the lines of a CSV; raises ValueError and csv.Error."""
    rows = csv.reader(file, strict=True, skipinitialspace=True)
    columns = (0, 1)
    for number, row in enumerate(row for row in rows if row):
        if number == 0 and {"path", "label"} <= set(row):
            columns = (row.index("path"), row.index("label"))
            continue
        if number == 0 and len(row) != 2:
            raise ValueError(
                f"line {rows.line_num} has {len(row)} columns; without names of columns it needs "
                "path and label"
            )
        if len(row) <= max(columns):
            raise ValueError(
                f"line {rows.line_num} has {len(row)} columns; path or label is missing"
            )
        path, label = (row[column].strip() for column in columns)
        if not path or not label:
            raise ValueError(f"line {rows.line_num} has no {'label' if path else 'path'}")
        yield _Line(rows.line_num, path, label)


def _json_lines(file: Iterator[str]) -> Iterator[_Line]:
    """Yields the lines of a JSON-lines file; raises ValueError."""
    for number, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            line = parse_json(text)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON ({error})") from error
        fields = line if isinstance(line, dict) else {}
        path, label = fields.get("path"), fields.get("label")
        is_label = isinstance(label, int | str) and not isinstance(label, bool) and label != ""
        if not isinstance(path, str) or not path or not is_label:
            raise ValueError(
                f'line {number} needs {{"path": text, "label": a whole number or a name}}'
            )
        yield _Line(number, path, label)


def _labels(lines: Sequence[_Line], *, is_csv: bool) -> list[int | str]:
    """Returns the labels; those of a CSV are numbers if they are written as such.

    Raises ValueError for a mixture, which would number the classes in alphabetical order.
    """
    labels = [line.label for line in lines]
    if not is_csv:
        return labels
    is_number = [re.fullmatch(r"-?\d{1,9}", str(label), re.ASCII) is not None for label in labels]
    if not any(is_number):
        return labels
    if not all(is_number):
        odd = lines[is_number.index(False)]
        raise ValueError(
            f"line {odd.number} has the label {odd.label!r}, and others are numbers; name the "
            "columns path and label, or correct the label"
        )
    return [int(label) for label in labels]


def _keys(path: Path, lines: Sequence[_Line]) -> list[str]:
    """Returns the path of each image inside the root; raises DataError for one that leaves it."""
    numbers: dict[str, int] = {}
    for line in lines:
        key = posixpath.normpath(line.path)
        where = f"{path}: line {line.number}: the path {line.path!r}"
        if "\0" in key:
            raise DataError(f"{where} holds the character NUL; correct it")
        if key.startswith(("/", "../")) or key in ("..", "."):
            raise DataError(f"{where} leads out of the folder; make it start from source.root")
        if (first := numbers.setdefault(key, line.number)) != line.number:
            raise DataError(f"{where} is in line {first} too; keep one of them")
    return list(numbers)
