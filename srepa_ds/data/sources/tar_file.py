"""Reads uncompressed tars, and tars in a tar, at the places of their files."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from srepa_ds.data.sources.entries import (
    Contents,
    Entry,
    check_names,
    check_size,
    read_at,
    refused,
    safe_name,
)
from srepa_ds.data.sources.listing import is_litter, listing_shown
from srepa_ds.errors import DataError

_BLOCK = 512
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}


def tar_contents(path: Path) -> Contents:
    """Returns the files of a tar; reads its headers alone.

    A tar of tars, such as ILSVRC2012_img_train.tar, holds a folder for each of them, named as it is
    without `.tar`. Raises OSError, and DataError for a tar that is compressed, damaged or hostile.
    """
    with path.open("rb") as file:
        _check_plain(path, file, 0)
        size = file.seek(0, 2)
        outer = _contents(str(path), file, 0, size)
        tars = _tars(outer)
        if not tars:
            return outer
        files, folders = [], set()
        for entry in listing_shown(tars, path, "tars"):
            prefix = entry.name.removesuffix(".tar")
            inner = _inner_contents(path, file, entry)
            files += [_below(prefix, one) for one in inner.files]
            folders |= {prefix, *(f"{prefix}/{name}" for name in inner.folders)}
    check_names(path, files)
    return Contents(files, frozenset(folders))


def read_tar_entry(path: Path, entry: Entry) -> bytes:
    """Returns the contents of a file; raises DataError."""
    return read_at(path, entry.start, entry.size)


def _tars(contents: Contents) -> list[Entry]:
    """Returns the files if all of them are tars, else none."""
    files = [entry for entry in contents.files if not is_litter(entry.name)]
    are_tars = all(entry.name.endswith(".tar") and "/" not in entry.name for entry in files)
    return files if are_tars else []


def _inner_contents(path: Path, file: BinaryIO, entry: Entry) -> Contents:
    where = f"{path}: {entry.name}"
    if entry.size == 0:
        raise DataError(f"{where}: is empty; download the archive again")
    _check_plain(where, file, entry.start)
    return _contents(where, file, entry.start, entry.start + entry.size)


def _below(prefix: str, entry: Entry) -> Entry:
    return Entry(f"{prefix}/{entry.name}", entry.start, entry.size)


def _check_plain(where: object, file: BinaryIO, start: int) -> None:
    file.seek(start)
    head = file.read(6)
    for magic, command in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(
                f"{where}: is compressed, so its files cannot be read in any order; uncompress it "
                f"first (`{command} -k FILE`); images hardly become larger"
            )


def _contents(where: str, file: BinaryIO, start: int, end: int) -> Contents:
    files, folders = [], set()
    for member in listing_shown(_members(where, file, start, end), where, "files"):
        name = safe_name(where, member.name)
        if member.isdir():
            folders.add(name)
            continue
        if not member.isreg() or member.issparse():
            kind = "a link" if member.issym() or member.islnk() else "neither a file nor a folder"
            raise refused(where, member.name, f"is {kind}")
        if member.offset_data + member.size > end:
            raise _damaged(where, "is truncated")
        check_size(where, member.name, member.size)
        files.append(Entry(name, member.offset_data, member.size))
    check_names(where, files)
    return Contents(files, frozenset(folders))


def _members(where: str, file: BinaryIO, start: int, end: int) -> Iterator[tarfile.TarInfo]:
    """Yields the headers of a tar from `start` to `end`; raises DataError if it is damaged."""
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            place = -1
            while (member := tar.next()) is not None:
                # Sizes below 0 lead back: some releases of Python would read the same for ever.
                if member.size < 0 or member.offset <= place:
                    raise _damaged(where, f"has an impossible header at byte {member.offset:,}")
                place = member.offset
                yield member
                # Otherwise tarfile keeps them all: 1 GB for ImageNet.
                tar.members.clear()  # type: ignore[missing-attribute]
            last = tar.offset
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise _damaged(where, f"is not a readable tar ({error})") from error
    # At a damaged header tarfile ends without a word.
    file.seek(last)
    if last + _BLOCK > end or file.read(_BLOCK) != bytes(_BLOCK):
        raise _damaged(where, f"has no header or end at byte {last - start:,}")


def _damaged(where: str, reason: str) -> DataError:
    return DataError(f"{where}: {reason}; download or make it again")
