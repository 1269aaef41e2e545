"""Reads a finished sample set: images, labels, contact sheet and provenance."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8
from numpy import ndarray
from numpy.lib.npyio import NpzFile
from PIL import Image

from srepa_ds.documents.json_reader import read_json
from srepa_ds.errors import DataError

SAMPLES = "samples.npz"
PROVENANCE = "provenance.json"
CONTACT_SHEET = "contact_sheet.png"

_IMAGES, _LABELS = "arr_0", "arr_1"
# Photographs hardly become smaller. A file made to exhaust memory becomes a thousand times larger.
_MOST_COMPRESSION = 50
_SMALL_BYTES = 64 << 20


def read_samples(
    folder: Path,
) -> tuple[UInt8[ndarray, "samples height width 3"], Int64[ndarray, " samples"] | None]:
    """Returns the images of an ADM archive, and their labels if it holds any.

    Raises DataError if the archive is missing, damaged or empty, or holds something else.
    """
    path = folder / SAMPLES
    arrays = _read(path, (_IMAGES, _LABELS))
    images, labels = arrays.get(_IMAGES), _labels(arrays, path)
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise _unfinished(path, "it holds no RGB images of 0..255")
    if len(images) == 0:
        raise _unfinished(path, "it is empty")
    if labels is not None and len(labels) != len(images):
        raise _unfinished(path, f"it holds {len(labels)} labels for {len(images)} images")
    return images, labels


def read_labels(folder: Path) -> Int64[ndarray, " samples"] | None:
    """Returns the labels of a sample set, if it holds any, without reading its images.

    Raises DataError if the archive is missing or damaged.
    """
    path = folder / SAMPLES
    return _labels(_read(path, (_LABELS,)), path)


def read_contact_sheet(folder: Path) -> Image.Image:
    """Returns the picture of a few samples of each class; raises DataError unless it is whole."""
    path = folder / CONTACT_SHEET
    try:
        return Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    # The decoder has many errors for damage; among them are SyntaxError and struct.error.
    except Exception as error:
        raise _unfinished(path, _reason(error)) from error


def read_provenance(folder: Path) -> dict[str, Any]:
    """Returns the provenance of a sample set; empty if it has none.

    Raises DataError if the file is damaged.
    """
    path = folder / PROVENANCE
    try:
        document = read_json(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{path}: {_reason(error)}; fix its permissions") from error
    except ValueError as error:
        raise _of_unknown_origin(path, f"is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise _of_unknown_origin(path, "is not a JSON object")
    return document


def _read(path: Path, names: tuple[str, ...]) -> dict[str, ndarray]:
    try:
        # Opened here, because numpy leaves a file open that is not an archive.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, NpzFile):
                raise ValueError("it holds a single array")
            with archive:
                members = {name: _member(archive, name) for name in names if name in archive.files}
    # A damaged file may raise anything: numpy and its zip reader trust its headers.
    except Exception as error:
        raise _unfinished(path, _reason(error)) from error
    # numpy returns a member that is not an array as bytes.
    return {name: array for name, array in members.items() if isinstance(array, ndarray)}


def _member(archive: NpzFile, name: str) -> Any:
    """Returns an array of the archive; raises ValueError before it takes more room than is there.

    numpy makes room for as many elements as the header of an array announces.
    """
    container = archive.zip
    assert container is not None
    # numpy leaves the suffix out of the names of arrays.
    entry = container.getinfo(f"{name}.npy" if f"{name}.npy" in container.namelist() else name)
    if entry.file_size > _MOST_COMPRESSION * entry.compress_size + _SMALL_BYTES:
        raise ValueError(f"{name} would take {entry.file_size >> 20:,} MiB when unpacked")
    with container.open(entry) as file:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
            file.seek(0)
            announced = _announced_bytes(file)
            if announced not in (None, entry.file_size - file.tell()):
                raise ValueError(f"the header of {name} does not fit its contents")
    return archive[name]


def _announced_bytes(file: Any) -> int | None:
    """Returns the size of the elements that an array's header announces; leaves it behind.

    None for an array of objects, which numpy refuses with a reason.
    """
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, _, dtype = read_header[version](file)
    return None if dtype.hasobject else math.prod(shape) * dtype.itemsize


def _labels(arrays: dict[str, ndarray], path: Path) -> ndarray | None:
    labels = arrays.get(_LABELS)
    if labels is None:
        return None
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise _unfinished(path, "its labels are not a list of integers")
    return labels.astype(np.int64)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__


def _unfinished(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path} is not a finished sample set ({reason}); draw one with `srepa-ds sample CONFIG`"
    )


def _of_unknown_origin(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path}: {reason}, so the samples' origin is unknown; give another folder, or remove this "
        "one to draw them again"
    )
