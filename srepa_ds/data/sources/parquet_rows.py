"""Random access to the images in parquet files, row group by row group."""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from srepa_ds.data.sources.image_file import read_failure
from srepa_ds.errors import DataError, SourceError
from srepa_ds.files import reason_of
from srepa_ds.weight_file import other_kind

_MOST_BYTES = 64 << 20
"""Of all row groups kept. `datasets` writes 100 images to a row group, 10 MB of ImageNet."""


def arrow() -> Any:
    """Returns pyarrow with its parquet reader; raises DataError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            "the source 'parquet' needs pyarrow; install the extra: pip install 'srepa_ds[parquet]'"
        ) from error
    return pyarrow


def opened_file(path: Path) -> Any:
    """Returns a `pyarrow.parquet.ParquetFile`, whose footer is read; raises DataError."""
    reader = arrow().parquet.ParquetFile
    with refusing(path):
        return reader(path)


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turns what pyarrow raises for a damaged or missing file into a DataError."""
    try:
        yield
    except (OSError, arrow().ArrowException) as error:
        raise DataError(f"{path}: {_reason(path, error)}; fetch the file again") from error


def _reason(path: Path, error: Exception) -> str:
    text = reason_of(error).split("\n")[0]
    try:
        kind = other_kind(path)
    except OSError:
        return text
    return f"not a readable parquet file ({kind if kind and 'LFS' in kind else text})"


@contextmanager
def _staying(path: Path) -> Iterator[None]:
    """Turns the OSErrors of disks, and of a file that has gone, into a SourceError."""
    try:
        yield
    except OSError as error:
        # pyarrow raises others for damaged contents.
        failure = read_failure(error, root=path)
        if isinstance(failure, SourceError):
            raise failure from error
        raise
    except DataError as error:
        if not path.exists():
            raise SourceError(
                f"{path}: has gone; the source cannot be read any more: restore it, and run the "
                "same command again"
            ) from error
        raise


class RowGroups:
    """The images in some files; the row groups read last stay in memory, for all threads."""

    def __init__(self, paths: Sequence[Path], *, column: str):
        self._paths = tuple(paths)
        self._column = column
        self._kept: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._starts: dict[int, list[int]] = {}
        # Threads ask for neighbouring rows, so the others would read the same group a second time.
        self._lock = threading.Lock()

    def image(self, number: int, row: int) -> bytes:
        """Returns the image in a row of file `number`; raises DataError if there is none."""
        path = self._paths[number]
        with self._lock, refusing(path), _staying(path):
            starts = self._starts_of(number)
            group = bisect_right(starts, row) - 1
            value = self._group(number, group)[row - starts[group]].as_py()
        if isinstance(value, dict):
            if value["bytes"] is None and value.get("path"):
                raise DataError(
                    f"holds only the path {value['path']!r} of the image; write the data set again "
                    "with the images embedded"
                )
            value = value["bytes"]
        if value is None:
            raise DataError("holds no image")
        return value

    def _starts_of(self, number: int) -> list[int]:
        """Returns the first row of each row group of a file, and the number of rows."""
        if number not in self._starts:
            with opened_file(self._paths[number]) as file:
                about = file.metadata
                counts = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
            self._starts[number] = [0, *accumulate(counts)]
        return self._starts[number]

    def _group(self, number: int, group: int) -> Any:
        """Returns the column of images in a row group, read now or kept."""
        if (number, group) not in self._kept:
            # One thread: with several, pyarrow would hold a batch for each.
            with opened_file(self._paths[number]) as file:
                table = file.read_row_group(group, columns=[self._column], use_threads=False)
            self._kept[number, group] = table.column(0)
            while len(self._kept) > 1 and self._num_bytes() > _MOST_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end((number, group))
        return self._kept[number, group]

    def _num_bytes(self) -> int:
        return sum(column.nbytes for column in self._kept.values())
