"""NumPy files with the moments of one image, read without running code that they may contain."""

import threading
from math import prod
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from srepa_ds.errors import DataError
from srepa_ds.files import reason_of

_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}

_PARSING = threading.Lock()


def shape_of_moments(path: Path) -> tuple[int, int, int]:
    """Returns the shape of the moments in a file, less a leading 1; raises DataError."""
    try:
        with path.open("rb") as file:
            shape, _, _ = _header(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {reason_of(error)}; write the file again") from error
    shape = shape[1:] if len(shape) == 4 and shape[0] == 1 else shape
    if len(shape) != 3 or shape[0] % 2 or 0 in shape:
        raise DataError(
            f"{path}: has the shape {shape}, expected (channels, height, width) with a mean and a "
            "standard deviation for each channel; correct source.path"
        )
    return shape[0], shape[1], shape[2]


def moments_in(
    path: Path, shape: tuple[int, int, int]
) -> Float[Tensor, "moments latent_height latent_width"]:
    """Returns the moments in a file, whose shape may have a leading 1.

    Raises DataError if they are not float32 of `shape`, not finite, or if a standard deviation is
    negative, as the logarithm of a variance can be.
    """
    try:
        with path.open("rb") as file:
            found, order, dtype = _header(file)
            if dtype != np.float32 or found not in (shape, (1, *shape)):
                raise DataError(f"{path}: holds {dtype} of shape {found}, expected float32 {shape}")
            values = np.fromfile(file, np.float32, prod(shape))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {reason_of(error)}") from error
    if len(values) != prod(shape):
        raise DataError(f"{path}: ends after {len(values)} of {prod(shape)} numbers")
    moments = torch.from_numpy(np.ascontiguousarray(values.reshape(shape, order=order)))
    if not moments.isfinite().all():
        raise DataError(f"{path}: holds numbers that are not finite")
    if moments.chunk(2)[1].min() < 0:
        raise DataError(
            f"{path}: holds negative standard deviations; these are not means and standard "
            "deviations as REPA writes them"
        )
    return moments


def _header(file: BinaryIO) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype]:
    """Returns the shape, the order and the type that a file announces; stops before the numbers.

    Raises ValueError and OSError.

    The announcement is checked before the array is read: it decides how much memory that takes.
    """
    version = np.lib.format.read_magic(file)
    read = _HEADER_READERS.get(version)
    if read is None:
        raise ValueError(f"it is of version {version} of NumPy's format, not 1.0 or 2.0")
    # NumPy parses a Python literal, which Python 3.11 cannot do in several threads at once.
    with _PARSING:
        shape, is_fortran, dtype = read(file)
    return shape, "F" if is_fortran else "C", dtype
