"""Reads a store of teacher tokens: memory-mapped files beside the shards, one per shard."""

from pathlib import Path

from jaxtyping import Int64
from torch import Tensor

from srepa_ds.data.headers import Header, Kind, check_header, read_header
from srepa_ds.data.mapped_files import MappedFiles
from srepa_ds.data.shard_index import ShardIndex
from srepa_ds.data.stored_tokens import StoredTokens
from srepa_ds.data.token_index import TokenIndex, again, read_token_index
from srepa_ds.errors import DataError
from srepa_ds.files import sha256_of


class TokenStore:
    """A finished store of one teacher's tokens; opening it checks every header."""

    def __init__(self, folder: Path):
        """Opens `folder`; raises DataError naming the first file that contradicts the index."""
        self.folder = folder
        self.index: TokenIndex = read_token_index(folder)
        kind = Kind("token file", again(folder))
        for entry in self.index.files:
            path, count = folder / entry.file, entry.num_samples
            found = read_header(path, kind, expected_bytes=entry.bytes)
            facts = self.index.facts(count, shard_sha256=entry.shard_sha256)
            expected = Header(facts, self.index.tensors(count), entry.bytes)
            check_header(path, kind, found, expected)
        self._files = MappedFiles(
            [folder / entry.file for entry in self.index.files],
            [entry.num_samples for entry in self.index.files],
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patch tokens."""
        return self.index.grid

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.index.width

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

    def read(self, indices: Int64[Tensor, " batch"]) -> StoredTokens:
        """Returns the tokens of the samples `indices`, in their order; raises IndexError."""
        found = self._files.gather(indices)
        return StoredTokens(found["patches"], found.get("patches_scale"), found.get("cls"))

    def verify(self) -> None:
        """Checks the hash of every file; raises DataError naming the first that differs."""
        for entry in self.index.files:
            path = self.folder / entry.file
            found = sha256_of(path)
            if found != entry.sha256:
                raise DataError(
                    f"{path}: contents changed since it was written (sha256 {found}, expected "
                    f"{entry.sha256}); {again(self.folder)}"
                )
