"""The source `parquet`: local parquet files as Hugging Face's `datasets` writes them.

A row has an image, `struct<bytes, path>` or plain bytes, and an integer label. The names of the
classes are in the metadata of the schema, if the files come from `datasets`.
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Int64
from pydantic import Field
from torch import Tensor

from srepa_ds.data.sources.foreign import files_below, numbered_classes
from srepa_ds.data.sources.parquet_rows import RowGroups, arrow, opened_file, refusing
from srepa_ds.data.sources.source import SourceItem
from srepa_ds.errors import DataError, listed
from srepa_ds.schema import Section

_OF_SPLIT = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(-[0-9a-f]+)?\.parquet")

_NUMBERED = re.compile(r"(?P<split>.*?)[-_.]?\d*\.parquet")


class ParquetConfig(Section):
    """Parquet files in the layout of Hugging Face's `datasets`, on this machine."""

    kind: Literal["parquet"]
    """Files such as `train-00000-of-00294.parquet`, with an image and a label in each row."""
    path: Path
    """A file, or the folder that holds the files or folders of them."""
    split: str | None = None
    """Takes only files named `SPLIT-00000-of-...`; needed where a folder has several splits."""
    image_column: str = "image"
    """The column of the images: bytes of image files, or a struct that has them as `bytes`."""
    label_column: str = "label"
    """The column of the labels, integers."""
    num_classes: int | None = Field(default=None, ge=1)
    """For files that do not name their classes: how many there are. Without it, the largest label
    is the last class."""

    def opened(self) -> "Parquet":
        """Returns the source; raises DataError if files are missing or of another form."""
        return Parquet(self)


class _File(NamedTuple):
    """What is known of a file without reading images."""

    labels: Int64[Tensor, " samples"]
    class_names: tuple[str, ...]
    """Empty if the file names none."""
    num_bytes: int


class Parquet:
    """Images and labels in the rows of parquet files; a row group is read as a whole."""

    class_ids = ()
    latents = None

    def __init__(self, config: ParquetConfig):
        root = config.path if config.path.is_dir() else config.path.parent
        self._names = _files_of(config)
        paths = [root / name for name in self._names]
        files = [_read(path, config) for path in paths]
        self._starts = [0, *accumulate(len(file.labels) for file in files)]
        self._sizes = [file.num_bytes for file in files]
        if self._starts[-1] == 0:
            raise DataError(f"{config.path}: its files hold no rows; correct source.path")
        self.labels = torch.cat([file.labels for file in files])
        _check_same_classes(config.path, self._names, files)
        self.class_names = _classes(files[0].class_names, self.labels, config)
        self._groups = RowGroups(paths, column=config.image_column)

    @property
    def fingerprint(self) -> str:
        """The hash of all names, numbers of rows, sizes and labels."""
        facts = [list(row) for row in zip(self._names, self._starts[1:], self._sizes, strict=True)]
        digest = hashlib.sha256(json.dumps(facts).encode())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()[:16]

    def key(self, index: int) -> str:
        """Returns the file and the row in it, counted from 0: `train-00000-of-00294.parquet:17`."""
        number, row = self._place(index)
        return f"{self._names[number]}:{row}"

    def item(self, index: int) -> SourceItem:
        """Returns one image, as the contents of its file; raises DataError."""
        return SourceItem(self._groups.image(*self._place(index)))

    def _place(self, index: int) -> tuple[int, int]:
        """Returns the file of a sample, and its row there."""
        number = bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]


def _check_same_classes(root: Path, names: Sequence[str], files: Sequence[_File]) -> None:
    """Checks that all files name the same classes; raises DataError."""
    for name, file in zip(names, files, strict=True):
        if file.class_names != files[0].class_names:
            raise DataError(
                f"{root}: {names[0]} and {name} have other classes, so they are not parts of one "
                "data set; set source.path to the folder of one"
            )


def _files_of(config: ParquetConfig) -> list[str]:
    """Returns the files, relative to their folder; raises DataError unless they are one split."""
    if config.path.is_file():
        return [config.path.name]
    found = files_below(
        config.path, lambda name: name.endswith(".parquet") and not name.startswith(".")
    )
    splits = sorted({_split_of(name) for name in found})
    if config.split is None and len(splits) > 1:
        raise DataError(f"{config.path}: holds several splits ({listed(splits)}); set source.split")
    chosen = [name for name in found if config.split in (None, _split_of(name))]
    if not chosen:
        held = f"; it has the splits {listed(splits)}" if splits else ""
        wanted = f"no parquet files of the split '{config.split}'" if config.split else "no parquet"
        raise DataError(f"{config.path}: holds {wanted}{held}; correct source.path or source.split")
    _check_complete(config.path, chosen)
    return chosen


def _split_of(name: str) -> str:
    """Returns the split of `train-00000-of-00294.parquet`, `train.parquet`, `train/0000.parquet`.

    Empty if the name tells none.
    """
    path = Path(name)
    found = _OF_SPLIT.fullmatch(path.name) or _NUMBERED.fullmatch(path.name)
    return (found["split"] if found else "") or path.parent.name


def _check_complete(root: Path, names: Sequence[str]) -> None:
    """Checks that each file of `...-of-00294` is there; raises DataError."""
    found = [match for name in names if (match := _OF_SPLIT.fullmatch(Path(name).name))]
    totals = {int(match["total"]) for match in found}
    if not totals:
        return
    numbers = sorted(int(match["number"]) for match in found)
    missing = sorted(set(range(max(totals))) - set(numbers))
    if len(totals) > 1 or len(set(numbers)) != len(numbers):
        raise DataError(f"{root}: mixes files of several versions of the split; remove the others")
    if missing:
        split, total = found[0]["split"], max(totals)
        absent = [f"{split}-{number:05d}-of-{total:05d}" for number in missing]
        raise DataError(f"{root}: lacks {listed(absent)}; fetch all files of the split")


def _check_columns(path: Path, schema: Any, config: ParquetConfig) -> None:
    """Checks that the columns are there and of the right types; raises DataError."""
    for field in ("image_column", "label_column"):
        if getattr(config, field) not in schema.names:
            raise DataError(
                f"{path}: has no column '{getattr(config, field)}', only "
                f"{listed(map(repr, schema.names))}; correct source.{field}"
            )
    types = arrow().types
    image = schema.field(config.image_column).type
    if types.is_struct(image) and image.get_field_index("bytes") >= 0:
        image = image.field("bytes").type
    if not (types.is_binary(image) or types.is_large_binary(image)):
        raise DataError(
            f"{path}: the column '{config.image_column}' holds {image}, not the bytes of images; "
            "correct source.image_column"
        )
    label = schema.field(config.label_column).type
    if not types.is_integer(label):
        raise DataError(
            f"{path}: the column '{config.label_column}' holds {label}, not integers; correct "
            "source.label_column"
        )


def _read(path: Path, config: ParquetConfig) -> _File:
    """Returns what is known of a file, of which only the labels are read; raises DataError."""
    with refusing(path), opened_file(path) as file:
        _check_columns(path, file.schema_arrow, config)
        labels = file.read(columns=[config.label_column], use_threads=False).column(0)
        names = _class_names(file.schema_arrow.metadata, config.label_column)
    if labels.null_count:
        raise DataError(f"{path}: {labels.null_count} rows have no label; leave them out")
    numbers = torch.tensor(labels.to_numpy().astype("int64"))
    return _File(numbers, names, path.stat().st_size)


def _classes(
    named: tuple[str, ...], labels: Int64[Tensor, " samples"], config: ParquetConfig
) -> tuple[str, ...]:
    """Returns the names of the classes, numbers where there are none; raises DataError."""
    if named and config.num_classes not in (None, len(named)):
        raise DataError(
            f"{config.path}: names {len(named)} classes itself; remove source.num_classes"
        )
    # Named or not, every label is checked.
    numbers = numbered_classes(
        labels, num_classes=len(named) or config.num_classes, place=config.path
    )
    return named or numbers


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...]:
    """Returns the classes that the metadata of a schema names, none if there are none."""
    try:
        document = json.loads((metadata or {})[b"huggingface"])
        names = document["info"]["features"][column]["names"]
    except (LookupError, TypeError, ValueError):
        return ()
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if is_list else ()
