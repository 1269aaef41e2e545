"""Reads a store of teacher tokens: files beside the shards, one per shard."""

import copy
from pathlib import Path

from jaxtyping import Int64
from torch import Tensor

from srepa_ds.data.contents import IndexedFile, check_contents
from srepa_ds.data.headers import Header, Kind, check_header, read_header, rows_of
from srepa_ds.data.reading import Reading
from srepa_ds.data.sample_files import SampleFiles
from srepa_ds.data.shard_index import ShardIndex
from srepa_ds.data.stored_files import StoredFile
from srepa_ds.data.stored_tokens import StoredTokens
from srepa_ds.data.token_index import TokenFileEntry, TokenIndex, again, read_token_index
from srepa_ds.errors import DataError


class TokenStore:
    """A finished store of one teacher's tokens; opening it checks every header."""

    def __init__(self, folder: Path):
        """Opens `folder`; raises DataError naming the first file that contradicts the index."""
        self.folder = folder
        self.index: TokenIndex = read_token_index(folder)
        self._files = SampleFiles(
            [check_token_file(folder, self.index, entry) for entry in self.index.files],
            [entry.num_samples for entry in self.index.files],
            rows_of(self.index.tensors(1)),
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patch tokens."""
        return self.index.grid

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.index.width

    def read_by(self, reading: Reading) -> "TokenStore":
        """Returns the same store, with its own open files, read in another way."""
        other = copy.copy(self)
        other._files = self._files.read_by(reading)
        return other

    def check_fits(self, shards: ShardIndex, folder: Path) -> None:
        """Checks that these are tokens of the images in `folder`; raises DataError."""
        if self.index.dataset_id != shards.dataset_id:
            raise DataError(
                f"{self.folder}: tokens of the data set {self.index.dataset_id}, but {folder} is "
                f"{shards.dataset_id}; {again(self.folder)}"
            )
        if len(self.index.files) != len(shards.shards):
            raise DataError(
                f"{self.folder}: tokens of {len(self.index.files)} shards, but {folder} has "
                f"{len(shards.shards)}; {again(self.folder)}"
            )
        for tokens, shard in zip(self.index.files, shards.shards, strict=True):
            found = (tokens.num_samples, tokens.shard_sha256)
            if found != (shard.num_samples, shard.sha256):
                raise DataError(
                    f"{self.folder / tokens.file}: tokens of {tokens.num_samples} images that are "
                    f"not the {shard.num_samples} in {folder / shard.file}; {again(self.folder)}"
                )

    @property
    def indexed_files(self) -> tuple[IndexedFile, ...]:
        """The hash that the index gives for each file."""
        return indexed_tokens(self.folder, self.index)

    def read(self, indices: Int64[Tensor, " batch"]) -> StoredTokens:
        """Returns the tokens of the samples `indices`, in their order.

        Raises IndexError, and DataError for a file that can no longer be read.
        """
        found = self._files.gather(indices)
        return StoredTokens(found["patches"], found.get("patches_scale"), found.get("cls"))

    def verify(self) -> None:
        """Checks the hash of every file; raises DataError naming the first that differs."""
        for file in self.indexed_files:
            check_contents(file)


def check_token_file(folder: Path, index: TokenIndex, entry: TokenFileEntry) -> StoredFile:
    """Returns one file of a store, whose header and size fit the index; raises DataError."""
    path, kind, count = folder / entry.file, Kind("token file", again(folder)), entry.num_samples
    found = read_header(path, kind, expected_bytes=entry.bytes)
    facts = index.facts(count, shard_sha256=entry.shard_sha256)
    check_header(path, kind, found.header, Header(facts, index.tensors(count), entry.bytes))
    return found.file


def indexed_tokens(folder: Path, index: TokenIndex) -> tuple[IndexedFile, ...]:
    """Returns the hash that the index of a store gives for each file."""
    cure = again(folder)
    return tuple(IndexedFile(folder / e.file, e.bytes, e.sha256, cure) for e in index.files)
