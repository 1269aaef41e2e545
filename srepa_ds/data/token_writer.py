"""Writes a store of teacher tokens: one file per shard, in any order, then the index."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from srepa_ds import files
from srepa_ds.data.headers import Header, Kind, check_header, read_header
from srepa_ds.data.shard_index import INDEX_NAME, ShardEntry
from srepa_ds.data.stored_tokens import StoredTokens
from srepa_ds.data.token_index import (
    TOKEN_FORMAT,
    TOKEN_VERSION,
    TokenDescription,
    TokenFileEntry,
    TokenIndex,
    again,
    form_bytes,
    token_file_name,
)
from srepa_ds.errors import DataError
from srepa_ds.files import sha256_of, write_aside, writing
from srepa_ds.schema import to_tree

_CURE = "make room or fix its permissions, then run the same command again"
_FILE = Kind("token file", "it is written again")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes `folder` and keeps other processes out of it; removes it if it stays empty.

    Raises OutputError if it cannot be written to or another process is writing the same store.
    """
    again = ", then run the same command again"
    with files.claimed(folder, doing="storing tokens in", cure=_CURE, otherwise=again):
        yield


@dataclass(frozen=True)
class TokenStoreWriter:
    """Writes one teacher's tokens of the images in `shards`; several ranks may share the files."""

    folder: Path
    description: TokenDescription
    shards: tuple[ShardEntry, ...]

    def path(self, number: int) -> Path:
        """Returns the file that goes with shard `number`."""
        return self.folder / token_file_name(number)

    def num_bytes(self, number: int) -> int:
        """Returns the size of the file that goes with shard `number`."""
        shard = self.shards[number]
        return self.description.file_bytes(shard.num_samples, shard_sha256=shard.sha256)

    def missing(self) -> tuple[int, ...]:
        """Returns the shards whose tokens are still to be written.

        Raises DataError if a file holds the tokens of other images.
        """
        return tuple(n for n in range(len(self.shards)) if not self._is_written(n))

    def _is_written(self, number: int) -> bool:
        # A file gets its name only when it is whole, so header and size suffice.
        path, shard, size = self.path(number), self.shards[number], self.num_bytes(number)
        try:
            found = read_header(path, _FILE, expected_bytes=size).header
        except DataError:
            return False
        if found.facts.get("shard_sha256", shard.sha256) != shard.sha256:
            # Such a folder holds hours of a teacher's work: never overwrite it unasked.
            raise DataError(
                f"{path}: tokens of other images than those in {shard.file} now; "
                f"{again(path.parent)}, or restore the images it was begun with"
            )
        facts = self.description.facts(shard.num_samples, shard_sha256=shard.sha256)
        expected = Header(facts, self.description.tensors(shard.num_samples), size)
        try:
            check_header(path, _FILE, found, expected)
        except DataError:
            return False
        return True

    def write(self, number: int, pieces: Iterable[StoredTokens]) -> None:
        """Writes the tokens of shard `number`, which `pieces` give in the order of its images.

        Each piece is written to its place at once, so memory is bounded by one piece. Raises
        OutputError, and what the iterator raises; then there is no file.
        """
        shard, tokens = self.shards[number], self.description
        preamble = tokens.preamble(shard.num_samples, shard_sha256=shard.sha256)
        starts = _starts(tokens, shard.num_samples, first=len(preamble))

        def write(aside: Path) -> None:
            done = 0
            with aside.open("wb") as file:
                file.write(preamble)
                for piece in pieces:
                    for name, tensor in piece.named_tensors().items():
                        rows = tensor.contiguous().view(torch.uint8).numpy()
                        file.seek(starts[name] + done * (rows.nbytes // len(piece)))
                        file.write(rows.data)
                    done += len(piece)
            assert done == shard.num_samples, f"{done} samples for a file of {shard.num_samples}"

        with writing(self.path(number), cure=_CURE):
            write_aside(self.path(number), write)

    def entry(self, number: int) -> TokenFileEntry:
        """Returns the index's entry for a written file; reads all of it."""
        path, shard = self.path(number), self.shards[number]
        with writing(path, cure=_CURE):
            return TokenFileEntry(
                file=path.name,
                num_samples=shard.num_samples,
                shard_sha256=shard.sha256,
                bytes=path.stat().st_size,
                sha256=sha256_of(path),
            )

    def finish(self, entries: Iterable[TokenFileEntry]) -> None:
        """Writes the index of all files, in any order; raises OutputError."""
        files = tuple(sorted(entries, key=lambda entry: entry.file))
        index = TokenIndex(
            **dict(self.description), format=TOKEN_FORMAT, version=TOKEN_VERSION, files=files
        )
        text = json.dumps(to_tree(index), indent=1) + "\n"
        with writing(self.folder, cure=_CURE):
            write_aside(self.folder / INDEX_NAME, lambda aside: aside.write_text(text))


def _starts(description: TokenDescription, num_samples: int, *, first: int) -> dict[str, int]:
    place, starts = first, {}
    for name, form in description.tensors(num_samples).items():
        starts[name] = place
        place += form_bytes(form)
    return starts
