"""Checks files that were downloaded, and states what they are."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from srepa_ds.encoders.fetched import Fetched, FetchedFile
from srepa_ds.errors import DataError
from srepa_ds.files import sha256_of


def received_files(
    folder: Path,
    expected: Mapping[str, str | None],
    *,
    sizes: Sequence[int],
    advice: str = "run the same command again",
) -> dict[str, FetchedFile]:
    """Returns size and hash of each downloaded file.

    `expected` has the hash that the other side states, or None; `sizes` are the bytes. Deletes a
    file that differs and raises DataError, which ends with `advice`.
    """
    files = {}
    for (name, sha256), num_bytes in zip(expected.items(), sizes, strict=True):
        path = folder / name
        found = FetchedFile(num_bytes=path.stat().st_size, sha256=sha256_of(path))
        if found.num_bytes != num_bytes or sha256 not in (None, found.sha256):
            path.unlink()
            raise DataError(
                f"{name}: damaged on its way ({found.num_bytes:,} bytes with sha256 "
                f"{found.sha256}, expected {num_bytes:,} with {sha256 or 'any'}); {advice}"
            )
        files[name] = found
    return files


def received(
    source: str, files: Mapping[str, FetchedFile], *, revision: str | None = None
) -> Fetched:
    """Returns the entry of `fetched.json` for files received now."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return Fetched(source=source, revision=revision, when=when, files=dict(files))
