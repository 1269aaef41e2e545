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
    form_bytes,
)
from srepa_ds.errors import DataError
from srepa_ds.files import sha256_of, write_aside
from srepa_ds.schema import to_tree


def is_written(path: Path, described: TokenDescription, num_samples: int) -> bool:
    """Returns whether an earlier run finished the file at `path`.

    It appears only when it is whole, so its header and its size are enough to know it by.
    """
    size = described.file_bytes(num_samples)
    kind = Kind("token file", "it is written again")
    try:
        found = read_header(path, kind, expected_bytes=size)
        expected = Header(described.facts(num_samples), described.tensors(num_samples), size)
        check_header(path, kind, found, expected)
    except DataError:
        return False
    return True


def write_tokens(
    path: Path, described: TokenDescription, num_samples: int, pieces: Iterable[StoredTokens]
) -> None:
    """Returns when `path` holds the tokens of `pieces`, `num_samples` images in all.

    Each piece goes to its place at once, so memory is bounded by one piece. Raises OSError, and
    what the iterator raises; then there is no file.
    """

    def write(aside: Path) -> None:
        done = 0
        with aside.open("wb") as file:
            file.write(described.preamble(num_samples))
            starts = _starts(described, num_samples)
            for piece in pieces:
                for name, tensor in piece.named_tensors().items():
                    rows = tensor.contiguous().view(torch.uint8).numpy()
                    file.seek(starts[name] + done * (rows.nbytes // len(piece)))
                    file.write(rows.data)
                done += len(piece)
        assert done == num_samples, f"{done} samples for a file of {num_samples}"

    write_aside(path, write)


def _starts(described: TokenDescription, num_samples: int) -> dict[str, int]:
    place, starts = len(described.preamble(num_samples)), {}
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
