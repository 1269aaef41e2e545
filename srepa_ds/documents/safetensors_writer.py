"""Writes safetensors files tensor by tensor, so that no more than one is in memory.

The file is a length, a JSON header and the bytes of all tensors in turn. The safetensors library
writes the same bytes, but wants all tensors at once.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 8
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}


class TensorEntry(NamedTuple):
    """A tensor of a file: its name, and what the header says of it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def in_file_order(entries: Sequence[TensorEntry]) -> list[TensorEntry]:
    """Returns `entries` as the safetensors library orders them: wide dtypes first, then by name."""
    return sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))


def safetensors_header(entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """Returns the first bytes of a file, up to the values of `entries`, which follow in turn."""
    document: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.num_bytes
        form = {"dtype": _DTYPES[entry.dtype], "shape": list(entry.shape)}
        document[entry.name] = {**form, "data_offsets": [begin, end]}
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path,
    entries: Sequence[TensorEntry],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> str:
    """Writes a file of `entries`, in their order, and returns its sha256 in hexadecimal.

    `read` returns the values of a name when their turn comes; they are cast to the entry's dtype.
    The file is on disk on return. Raises OSError, and ValueError for values of another shape.
    """
    header = safetensors_header(entries, metadata)
    digest = hashlib.sha256(header)
    with path.open("wb") as file:
        file.write(header)
        for entry in entries:
            content = values_of(read(entry.name), entry)
            file.write(content)
            digest.update(content)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def values_of(tensor: Tensor, entry: TensorEntry) -> memoryview:
    """Returns the bytes of a tensor as `entry` announces them; raises ValueError for its shape."""
    if tuple(tensor.shape) != entry.shape:
        raise ValueError(f"{entry.name} is {tuple(tensor.shape)}, not {entry.shape}")
    values = tensor.detach().to("cpu", entry.dtype).contiguous()
    return values.reshape(-1).view(torch.uint8).numpy().data
