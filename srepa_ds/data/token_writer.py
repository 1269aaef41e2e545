"""Writing a folder of stored teacher tokens: file by file, in any order, the index last."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

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
)
from srepa_ds.errors import DataError
from srepa_ds.files import sha256_of, write_aside
from srepa_ds.schema import to_tree


def is_written(path: Path, described: TokenDescription, shard: ShardEntry) -> bool:
    """Returns whether an earlier run finished the tokens of `shard` at `path`.

    The file appears only when it is whole, so its header and its size are enough to know it by.
    Raises DataError if it holds the tokens of other images.
    """
    count, size = shard.num_samples, file_bytes(described, shard)
    kind = Kind("token file", "it is written again")
    try:
        found = read_header(path, kind, expected_bytes=size)
    except DataError:
        return False
    if found.facts.get("shard_sha256", shard.sha256) != shard.sha256:
        # Hours of a teacher's work lie in such a folder, so it is not overwritten unasked.
        raise DataError(
            f"{path}: tokens of other images than those that are in {shard.file} now; "
            f"{again(path.parent)}, or bring back the images it was begun with"
        )
    facts = described.facts(count, shard_sha256=shard.sha256)
    try:
        check_header(path, kind, found, Header(facts, described.tensors(count), size))
    except DataError:
        return False
    return True


def file_bytes(described: TokenDescription, shard: ShardEntry) -> int:
    """Returns the size of the file with the tokens of `shard`."""
    return described.file_bytes(shard.num_samples, shard_sha256=shard.sha256)


def write_tokens(
    path: Path, described: TokenDescription, shard: ShardEntry, pieces: Iterable[StoredTokens]
) -> None:
    """Returns when `path` holds the tokens of `pieces`, in all those of the images of `shard`.

    Each piece goes to its place at once, so memory is bounded by one piece. Raises OSError, and
    what the iterator raises; then there is no file.
    """

    preamble = described.preamble(shard.num_samples, shard_sha256=shard.sha256)
    starts = _starts(described, shard.num_samples, first=len(preamble))

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

    write_aside(path, write)


def _starts(described: TokenDescription, num_samples: int, *, first: int) -> dict[str, int]:
    place, starts = first, {}
    for name, form in described.tensors(num_samples).items():
        starts[name] = place
        place += form_bytes(form)
    return starts


def entry_of(path: Path, shard: ShardEntry) -> TokenFileEntry:
    """Returns what the index says of a written file; reads all of it."""
    return TokenFileEntry(
        file=path.name,
        num_samples=shard.num_samples,
        shard_sha256=shard.sha256,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
    )


def write_token_index(
    folder: Path, described: TokenDescription, files: Sequence[TokenFileEntry]
) -> None:
    """Returns when `folder` is a finished store of `files`; raises OSError."""
    index = TokenIndex(
        **dict(described), format=TOKEN_FORMAT, version=TOKEN_VERSION, files=tuple(files)
    )
    text = json.dumps(to_tree(index), indent=1) + "\n"
    write_aside(folder / INDEX_NAME, lambda aside: aside.write_text(text))
