"""Reads NumPy archives (.npz) within bounds: no objects, no more than their headers announce."""

import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

_SUFFIX = ".npy"
# Photographs hardly become smaller. A file made to exhaust memory becomes a thousand times larger.
_MOST_COMPRESSION = 50
_SMALL_BYTES = 64 << 20
_MOST_MEMBERS = 10_000
_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True)
class NpzArray:
    """Shape and dtype of an array in an archive."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class NpzArchive:
    """An open archive; use it in a `with` statement.

    Arrays are read whole or in blocks of rows, so that memory does not grow with the archive.
    """

    def __init__(self, path: Path):
        """Reads the headers of all arrays.

        Raises OSError for a file that cannot be opened. Raises ValueError for one that is not an
        archive, is damaged or truncated, holds Python objects, or contradicts its headers.
        """
        self.path = path
        self._zip = _opened(path)
        try:
            self._entries = self._checked_entries()
            self.arrays: Mapping[str, NpzArray] = {
                name: self._header(name) for name in self._entries
            }
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> "NpzArchive":
        return self

    def __exit__(self, *exception: object) -> None:
        self._zip.close()

    @property
    def checksums(self) -> dict[str, tuple[int, int]]:
        """CRC-32 and number of bytes of every array, which are compared when it is read whole."""
        return {name: (entry.CRC, entry.file_size) for name, entry in self._entries.items()}

    def read(self, name: str) -> ndarray:
        """Returns an array; raises KeyError without it, ValueError if it is damaged."""
        array = self.arrays[name]
        if not array.shape:
            (whole,) = self._blocks(name, NpzArray((1,), array.dtype), 1)
            return whole.reshape(())
        blocks = list(self.blocks(name, max(1, array.shape[0])))
        return blocks[0] if blocks else np.empty(array.shape, array.dtype)

    def blocks(self, name: str, rows: int) -> Iterator[ndarray]:
        """Yields an array in blocks of `rows` along its first axis, the last of which is shorter.

        The archive's checksum is compared at the end. Raises KeyError without the array, ValueError
        if it is damaged, or has no axis.
        """
        array = self.arrays[name]
        if not array.shape:
            raise ValueError(f"{name} is a single number")
        yield from self._blocks(name, array, rows)

    def _blocks(self, name: str, array: NpzArray, rows: int) -> Iterator[ndarray]:
        row_bytes = math.prod(array.shape[1:]) * array.dtype.itemsize
        try:
            with self._zip.open(self._entries[name]) as file:
                _read_header(file)
                for start in range(0, array.shape[0], rows):
                    count = min(rows, array.shape[0] - start)
                    contents = file.read(count * row_bytes)
                    if len(contents) != count * row_bytes:
                        raise ValueError(f"{name} ends too early")
                    shape = (count, *array.shape[1:])
                    # A copy, because frombuffer's arrays cannot be written to.
                    yield np.frombuffer(contents, array.dtype).reshape(shape).copy()
                if file.read(1):
                    raise ValueError(f"{name} holds more than its header announces")
        except (ValueError, OSError):
            raise
        # zipfile and zlib have errors of their own for damage.
        except Exception as error:
            raise ValueError(f"{name} is damaged ({error})") from error

    def _checked_entries(self) -> dict[str, zipfile.ZipInfo]:
        entries = self._zip.infolist()
        if len(entries) > _MOST_MEMBERS:
            raise ValueError(f"it holds {len(entries):,} members")
        names = [entry.filename for entry in entries]
        if len(set(names)) != len(names):
            raise ValueError("it holds two members of one name")
        # What is not an array is none of ours.
        arrays = {
            entry.filename.removesuffix(_SUFFIX): entry
            for entry in entries
            if entry.filename.endswith(_SUFFIX)
        }
        for name, entry in arrays.items():
            if entry.file_size > _MOST_COMPRESSION * entry.compress_size + _SMALL_BYTES:
                raise ValueError(f"{name} would take {entry.file_size >> 20:,} MiB when unpacked")
        return arrays

    def _header(self, name: str) -> NpzArray:
        entry = self._entries[name]
        try:
            with self._zip.open(entry) as file:
                array, fortran_order = _read_header(file)
                left = entry.file_size - file.tell()
        except zipfile.BadZipFile as error:
            raise ValueError(f"{name} is damaged ({error})") from error
        # numpy trusts what it reads, and raises whatever follows from it.
        except Exception as error:
            raise ValueError(f"{name} is not an array ({error})") from error
        if array.dtype.hasobject:
            raise ValueError(
                f"{name} holds Python objects, which are not read because they can run code"
            )
        if fortran_order and len(array.shape) > 1:
            raise ValueError(f"{name} is stored by columns; save it in C order")
        if min(array.shape, default=0) < 0:
            raise ValueError(f"the header of {name} gives a negative size")
        if math.prod(array.shape) * array.dtype.itemsize != left:
            raise ValueError(f"the header of {name} does not fit its contents")
        return array


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        reason = "it is empty" if path.stat().st_size == 0 else f"{error}".lower()
        raise ValueError(f"it is not an .npz archive, or is truncated ({reason})") from error
    except (NotImplementedError, UnicodeDecodeError, EOFError) as error:
        raise ValueError(f"it is not a readable archive ({error})") from error


def _read_header(file: Any) -> tuple[NpzArray, bool]:
    """Returns shape, dtype and whether the order is Fortran's; raises ValueError."""
    version = np.lib.format.read_magic(file)
    if version not in _READERS:
        raise ValueError(f"version {version} of the format is not known")
    shape, fortran_order, dtype = _READERS[version](file)
    return NpzArray(shape, dtype), fortran_order
