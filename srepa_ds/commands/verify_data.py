"""The part of `srepa-ds verify` that knows data sets and stored tokens."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.data.contents import IndexedFile, check_contents
from srepa_ds.data.index_document import INDEX_NAME
from srepa_ds.data.latent_file import check_latents, indexed_latents
from srepa_ds.data.prepared_folder import MARKER_NAME
from srepa_ds.data.shard_file import (
    check_labels,
    check_shard,
    indexed_shards,
    labels_of,
    shard_name,
)
from srepa_ds.data.shard_index import ShardEntry, ShardIndex, read_index
from srepa_ds.data.shards import ShardDataset
from srepa_ds.data.token_index import (
    TOKEN_FORMAT,
    TokenFileEntry,
    TokenIndex,
    is_finished,
    read_token_index,
    token_file_name,
)
from srepa_ds.data.token_store import TokenStore, check_token_file, indexed_tokens
from srepa_ds.data.unfinished import progress_in
from srepa_ds.documents.json_reader import read_json
from srepa_ds.errors import DataError, SRepaError
from srepa_ds.preparation.inspection import check_codec, check_sample, summary
from srepa_ds.training.stored_teachers import STORES


class Part(NamedTuple):
    """Files that are checked together."""

    files: tuple[Path, ...]
    check: Callable[[], object]
    """Raises SRepaError if they are not as they were written."""


class DataSet:
    """One data set: its parts, and what was found of it once they are checked."""

    def __init__(self, folder: Path, codec: LatentCodec | None = None):
        """With a codec, latents are compared with those that it makes of the images."""
        self.folder = folder
        self._codec = codec
        self._num_read = 0
        self._num_encoded: int | None = None

    def parts(self) -> Iterator[Part]:
        """Yields the shards, the latents, a sample of both, and the finished stores beside them."""
        try:
            index = read_index(self.folder)
        except SRepaError as error:
            yield _failed(self.folder / INDEX_NAME, _with_progress(self.folder, error))
            return
        yield Part((self.folder / INDEX_NAME,), lambda: None)
        yield from _of_shards(self.folder, index)
        yield from _of_latents(self.folder, index)
        yield Part((), self._check_sample)
        if self._codec is not None:
            yield Part((), partial(self._check_codec, self._codec))
        for store in filter(is_finished, sorted((self.folder / STORES).glob("*"))):
            yield from parts_of_store(store)
            yield Part((), partial(_check_fits, store, index, self.folder))

    def index(self) -> ShardIndex | None:
        """Returns the index, None if it cannot be read, which is one of the faults then."""
        try:
            return read_index(self.folder)
        except SRepaError:
            return None

    def opened(self) -> ShardDataset:
        """Returns the data set; raises DataError if a header does not fit the index."""
        return ShardDataset(self.folder)

    def summary(self, *, every_class: bool) -> Iterator[str]:
        """Yields the lines that describe the data set, once all parts are checked."""
        read, encoded = self._num_read, self._num_encoded
        yield from summary(self.opened(), read=read, encoded=encoded, every_class=every_class)

    def _check_sample(self) -> None:
        self._num_read = check_sample(self.opened())

    def _check_codec(self, codec: LatentCodec) -> None:
        self._num_encoded = check_codec(self.opened(), codec)


def is_store(folder: Path) -> bool:
    """Returns whether a folder holds stored tokens, finished or not; raises OSError."""
    names = {path.name for path in folder.iterdir()}
    return _format_of(folder) == TOKEN_FORMAT or token_file_name(0) in names


def is_data(folder: Path) -> bool:
    """Returns whether a folder holds shards of a data set, finished or not; raises OSError."""
    names = {path.name for path in folder.iterdir()}
    return not is_store(folder) and bool({INDEX_NAME, MARKER_NAME, shard_name(0)} & names)


def _format_of(folder: Path) -> object:
    try:
        return read_json(folder / INDEX_NAME)["format"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _with_progress(folder: Path, error: SRepaError) -> SRepaError:
    """Returns an error that also says how much of an unfinished data set is written."""
    if not (folder / MARKER_NAME).exists() or (folder / INDEX_NAME).exists():
        return error
    done = progress_in(folder)
    text = f"{done.shards} shards with {done.samples:,} samples are written"
    text += f", latents of {done.latents} of them" if done.latents else ""
    text += f", {done.skipped:,} images were left out" if done.skipped else ""
    return DataError(f"{error}; {text}: the same command writes the rest")


def _of_shards(folder: Path, index: ShardIndex) -> Iterator[Part]:
    files = indexed_shards(folder, index)
    for entry, file in zip(index.shards, files, strict=True):
        yield Part((file.path,), partial(_check_shard, folder, index, entry, file))


def _check_shard(folder: Path, index: ShardIndex, entry: ShardEntry, indexed: IndexedFile) -> None:
    file = check_shard(folder, index, entry)
    check_contents(indexed)
    check_labels(file.path, labels_of(file, entry.num_samples), num_classes=index.num_classes)


def _of_latents(folder: Path, index: ShardIndex) -> Iterator[Part]:
    files = indexed_latents(folder, index.latents)
    for number, file in enumerate(files):
        yield Part((file.path,), partial(_check_latents, folder, index, number, file))


def _check_latents(folder: Path, index: ShardIndex, number: int, indexed: IndexedFile) -> None:
    assert index.latents is not None
    entry, count = index.latents.files[number], index.shards[number].num_samples
    check_latents(folder, index.latents, entry, num_samples=count)
    check_contents(indexed)


def parts_of_store(folder: Path) -> Iterator[Part]:
    """Yields the files of a store of tokens."""
    try:
        index = read_token_index(folder)
    except SRepaError as error:
        yield _failed(folder / INDEX_NAME, error)
        return
    yield Part((folder / INDEX_NAME,), lambda: None)
    files = indexed_tokens(folder, index)
    for entry, file in zip(index.files, files, strict=True):
        yield Part((file.path,), partial(_check_tokens, folder, index, entry, file))


def _check_tokens(
    folder: Path, index: TokenIndex, entry: TokenFileEntry, file: IndexedFile
) -> None:
    check_token_file(folder, index, entry)
    check_contents(file)


def _check_fits(store: Path, index: ShardIndex, folder: Path) -> None:
    TokenStore(store).check_fits(index, folder)


def _failed(path: Path, error: SRepaError) -> Part:
    def fail() -> None:
        raise error

    return Part((path,), fail)
