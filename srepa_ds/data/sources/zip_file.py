"""Reads zips at the places of their files, from any thread.

The standard library's ZipFile locks a handle for each read, and parses the whole directory again
for each further handle. Here it parses the directory once.
"""

import itertools
import stat
import struct
import zipfile
import zlib
from pathlib import Path

from srepa_ds.data.sources.entries import (
    Contents,
    Entry,
    check_names,
    check_size,
    read_at,
    refused,
    safe_name,
)
from srepa_ds.errors import DataError

# Before the contents of a file: its own header, name and extra fields. Source: APPNOTE.TXT, 4.3.7.
_HEADER = struct.Struct("<4s22xHH")
_MAGIC = b"PK\x03\x04"
_ENCRYPTED = 0x1
# No deflated data becomes more than 1,032 times as large.
_MOST_TIMES = 1_040


def zip_contents(path: Path) -> Contents:
    """Returns the files of a zip; reads its directory alone.

    Raises OSError, and DataError for a zip that is damaged or hostile.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error) as error:
        raise DataError(
            f"{path}: is not a readable zip ({error}); download or make it again"
        ) from error
    folders = frozenset(safe_name(path, info.filename) for info in infos if info.is_dir())
    files = [_entry(path, info) for info in infos if not info.is_dir()]
    check_names(path, files)
    _check_apart(path, files, path.stat().st_size)
    return Contents(files, folders)


def read_zip_entry(path: Path, entry: Entry) -> bytes:
    """Returns the contents of a file; raises DataError if they are damaged."""
    magic, name_bytes, extra_bytes = _HEADER.unpack(read_at(path, entry.start, _HEADER.size))
    if magic != _MAGIC:
        raise DataError("the archive has no file where its directory says")
    start = entry.start + _HEADER.size + name_bytes + extra_bytes
    if entry.packed is None:
        contents = read_at(path, start, entry.size)
    else:
        contents = _inflated(read_at(path, start, entry.packed), entry.size)
    if len(contents) != entry.size or zlib.crc32(contents) != entry.checksum:
        raise DataError("its contents in the archive are damaged (CRC)")
    return contents


def _inflated(packed: bytes, size: int) -> bytes:
    """Returns at most one byte more than `size`, which then is wrong."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1)
    except zlib.error as error:
        raise DataError(f"its contents in the archive are damaged ({error})") from error


def _entry(path: Path, info: zipfile.ZipInfo) -> Entry:
    name = safe_name(path, info.orig_filename)
    if info.flag_bits & _ENCRYPTED:
        raise refused(path, info.filename, "is encrypted")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise refused(path, info.filename, "is a link")
    check_size(path, info.filename, info.file_size)
    if info.compress_type == zipfile.ZIP_STORED:
        packed = None
    elif info.compress_type == zipfile.ZIP_DEFLATED:
        packed = info.compress_size
    else:
        raise refused(path, info.filename, f"is compressed by method {info.compress_type}")
    times = 1 if packed is None else _MOST_TIMES
    if info.file_size > times * info.compress_size:
        sizes = f"{info.file_size:,} bytes from {info.compress_size:,}"
        raise refused(path, info.filename, f"announces {sizes}")
    return Entry(name, info.header_offset, info.file_size, packed, info.CRC)


def _check_apart(path: Path, files: list[Entry], end: int) -> None:
    """Checks that no two files share bytes, as in bombs of many files; raises DataError."""
    ordered = sorted(files, key=lambda entry: entry.start)
    starts = itertools.chain((entry.start for entry in ordered[1:]), [end])
    for entry, following in zip(ordered, starts, strict=True):
        size = entry.size if entry.packed is None else entry.packed
        if entry.start + _HEADER.size + size > following:
            raise refused(path, entry.name, "overlaps with another")
