"""NumPy archives written block by block, so that memory does not grow with the set."""

import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# A fixed date makes equal samples equal files.
_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class NpzMember:
    """One array of an archive, given as consecutive blocks along its first axis."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Iterator[np.ndarray]


def write_npz(path: Path, members: Iterable[NpzMember]) -> None:
    """Writes an uncompressed archive that `numpy.load` reads; beyond 4 GiB it is a zip64 file.

    Raises ValueError if the blocks of a member do not add up to its shape.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for member in members:
            entry = zipfile.ZipInfo(f"{member.name}.npy", date_time=_DATE)
            with archive.open(entry, "w", force_zip64=True) as file:
                header = {
                    "descr": np.lib.format.dtype_to_descr(member.dtype),
                    "fortran_order": False,
                    "shape": member.shape,
                }
                np.lib.format.write_array_header_1_0(file, header)
                for block in _checked_blocks(member):
                    file.write(np.ascontiguousarray(block).data)


def _checked_blocks(member: NpzMember) -> Iterator[np.ndarray]:
    count = 0
    for block in member.blocks:
        if block.shape[1:] != member.shape[1:] or block.dtype != member.dtype:
            raise ValueError(
                f"{member.name}: got a block of {block.dtype}{list(block.shape)} "
                f"for an array of {member.dtype}{list(member.shape)}"
            )
        yield block
        count += len(block)
    if count != member.shape[0]:
        raise ValueError(f"{member.name}: got {count} rows, expected {member.shape[0]}")
