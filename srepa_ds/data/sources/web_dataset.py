"""The source `web_dataset`: tars in which the files of one sample share a name up to its first dot.

Source of the convention: the WebDataset library (`000123.jpg`, `000123.cls`, `000123.json`).
"""

import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from srepa_ds.data.sources.entries import Entry, read_at
from srepa_ds.data.sources.listing import (
    ListedSource,
    is_image,
    is_litter,
    listed_by_label,
    reading,
)
from srepa_ds.data.sources.source import SourceItem
from srepa_ds.data.sources.tar_file import read_tar_entry, tar_contents
from srepa_ds.documents.json_reader import parse_json
from srepa_ds.errors import DataError, listed
from srepa_ds.schema import Section

log = logging.getLogger("srepa_ds")

# Reading one may run any code that somebody has put into it.
_PICKLES = frozenset(("pkl", "pickle", "pyd", "pth", "pt"))
_MOST_LABEL_BYTES = 1 << 20
_THREADS = 8


class WebDatasetConfig(Section):
    """Tars of the WebDataset library, on a local disk."""

    kind: Literal["web_dataset"]
    """A sample is the files of one name up to its first dot, with one image among them. Its label
    is in `.cls`, or in a field of `.json`. Pickles (`.pkl`, `.pyd`, `.pth`) are never read."""
    path: Path | tuple[Path, ...]
    """A folder of uncompressed `.tar` files, or some of them."""
    label_field: str | None = None
    """The field of each sample's `.json` with the label, a whole number or a name; without it, the
    whole number in `.cls`."""

    def opened(self) -> "WebDataset":
        """Returns the source; raises DataError if tars cannot be read or lack labels."""
        return WebDataset(self.path, label_field=self.label_field)


class _Sample(NamedTuple):
    """One sample in a tar."""

    key: str
    path: Path
    image: Entry
    label: int | str


class WebDataset(ListedSource):
    """Labelled images in tars, in the order of the tars and in theirs."""

    def __init__(self, path: Path | tuple[Path, ...], *, label_field: str | None = None):
        """Reads the headers of all tars and their labels; raises DataError."""
        shards = _shards(path)
        where = shards[0].parent
        samples: list[_Sample] = []
        with ThreadPoolExecutor(_THREADS) as pool:
            for some in pool.map(lambda shard: _samples(shard, label_field), shards):
                samples += some
        if not samples:
            raise DataError(f"{where}: holds no samples with an image; correct source.path")
        self._samples = samples
        try:
            images, classes = listed_by_label(
                (sample.key, sample.label, sample.image.size) for sample in samples
            )
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        super().__init__(where, images, classes)

    def item(self, index: int) -> SourceItem:
        """Returns one image, as the contents of its file; raises DataError."""
        sample = self._samples[index]
        return SourceItem(read_tar_entry(sample.path, sample.image))


def _shards(path: Path | tuple[Path, ...]) -> list[Path]:
    """Returns the tars, in the order of their names unless they are given one by one."""
    if isinstance(path, tuple):
        names = [one.name for one in path]
        twins = sorted({name for name in names if names.count(name) > 1})
        if twins or not path:
            what = f"names {listed(twins)} more than once" if twins else "names no tar"
            raise DataError(f"source.path: {what}; a sample is known by the name of its tar")
        return list(path)
    if path.is_file():
        return [path]
    with reading(path, needs="a folder of tars"):
        found = sorted(one for one in path.iterdir() if not is_litter(one.name))
    shards = [one for one in found if one.suffix == ".tar"]
    if not shards:
        raise DataError(f"{path}: holds no .tar files; correct source.path")
    return shards


def _samples(shard: Path, label_field: str | None) -> list[_Sample]:
    """Returns the samples of a tar that have an image; raises DataError."""
    with reading(shard, needs="tars"):
        contents = tar_contents(shard)
    found = []
    for name, files in _grouped(shard, contents.files):
        images = [entry for extension, entry in files.items() if _is_of_image(extension)]
        if not images:
            continue
        if len(images) > 1:
            names = listed(entry.name for entry in images)
            raise DataError(f"{shard}: the sample {name!r} has several images ({names}); keep one")
        label = _label(shard, name, files, label_field)
        found.append(_Sample(f"{shard.name}/{images[0].name}", shard, images[0], label))
    return found


def _grouped(shard: Path, files: list[Entry]) -> Iterator[tuple[str, dict[str, Entry]]]:
    """Yields the name of each sample, and its files by endings in lower case; raises DataError."""
    groups: dict[str, dict[str, Entry]] = {}
    for entry in files:
        folder, slash, name = entry.name.rpartition("/")
        if any(map(is_litter, entry.name.split("/"))):
            continue
        base, _, extension = name.partition(".")
        group = groups.setdefault(folder + slash + base, {})
        if extension.lower() in group:
            raise DataError(
                f"{shard}: {group[extension.lower()].name!r} and {entry.name!r} are the same file "
                "of one sample; keep one"
            )
        group[extension.lower()] = entry
    return iter(groups.items())


def _is_of_image(extension: str) -> bool:
    # `seg.png` is that of a mask, not of the image.
    return "." not in extension and is_image(f"image.{extension}")


def _label(shard: Path, name: str, files: dict[str, Entry], label_field: str | None) -> int | str:
    """Returns the label of a sample; raises DataError."""
    wanted = "cls" if label_field is None else "json"
    entry = files.get(wanted)
    if entry is None:
        pickles = [files[extension].name for extension in files if extension in _PICKLES]
        why = (
            f"; {listed(pickles)} could run code and is not read: write labels as text"
            if pickles
            else "; name the field of .json with the label as source.label_field"
            if "json" in files
            else f"; write one whole number into NAME.{wanted}"
        )
        raise DataError(f"{shard}: the sample {name!r} has no .{wanted}{why}")
    if entry.size > _MOST_LABEL_BYTES:
        raise DataError(f"{shard}: {entry.name!r} has {entry.size:,} bytes, too many for a label")
    contents = read_at(shard, entry.start, entry.size)
    try:
        text = contents.decode()
        label = _number(text) if label_field is None else _of_field(text, label_field)
    except ValueError as error:
        raise DataError(f"{shard}: {entry.name!r} holds no label ({error})") from error
    return label


def _number(text: str) -> int:
    if not re.fullmatch(r"\s*\d{1,9}\s*", text, re.ASCII):
        raise ValueError(f"{text[:20]!r} is not a whole number")
    return int(text)


def _of_field(text: str, field: str) -> int | str:
    document = parse_json(text)
    label = document.get(field) if isinstance(document, dict) else None
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ValueError(f"its {field!r} is {str(label)[:20]!r}, not a whole number or a name")
    return label
