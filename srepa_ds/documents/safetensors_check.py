"""Looks at the header of a safetensors file, so that a damaged one is called what it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srepa_ds.documents.json_reader import parse_json

_LENGTH_BYTES = 8
# The header of SiT-XL/2 with projectors has 40 KB.
_MOST_BYTES = 16 << 20


def check_safetensors(path: Path) -> None:
    """Raises ValueError if a file is truncated, or if its header cannot be that of its bytes.

    The safetensors library checks the rest: dtypes, shapes, and that there are no gaps.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > _MOST_BYTES:
            raise ValueError(f"it is damaged or malicious: its header would have {length:,} bytes")
        if _LENGTH_BYTES + length > size:
            raise ValueError(
                f"it is truncated: its header has {length:,} bytes, and the whole file {size:,}"
            )
        text = file.read(length)
    try:
        header = parse_json(text.decode("utf-8"))
        end = max((_end_of(entry) for entry in _tensors_in(header)), default=0)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"it is damaged: its header is none of safetensors ({error})") from error
    expected = _LENGTH_BYTES + length + end
    if expected > size:
        raise ValueError(
            f"it is truncated, or its header damaged: it should have {expected:,} bytes, and has "
            f"{size:,}"
        )
    if expected < size:
        raise ValueError(
            f"it is damaged: {size - expected:,} of its {size:,} bytes are of no tensor"
        )


def _tensors_in(header: Any) -> list[Any]:
    if not isinstance(header, Mapping):
        raise TypeError("it is not an object")
    return [entry for name, entry in header.items() if name != "__metadata__"]


def _end_of(entry: Any) -> int:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end:
        raise ValueError(f"bytes {begin} to {end}")
    return end
