"""Headers of safetensors files: written, read, and checked against an index."""

import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from srepa_ds.data.sample_files import Row
from srepa_ds.data.stored_files import Identity, StoredFile
from srepa_ds.documents.json_reader import parse_json
from srepa_ds.errors import DataError

_KEY = "srepa_ds"

Form = tuple[str, tuple[int, ...]]
"""A tensor's dtype, in safetensors' spelling, and its shape."""

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}


class Kind(NamedTuple):
    """A kind of file, for messages: its name, and the cure for a damaged one."""

    name: str
    again: str


class Header(NamedTuple):
    """A file's facts, the forms of its tensors, and its size in bytes."""

    facts: dict[str, Any]
    tensors: dict[str, Form]
    num_bytes: int


class FoundHeader(NamedTuple):
    """The header of a file on disk, and where its tensors begin."""

    header: Header
    file: StoredFile


def metadata_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """Returns `facts` as metadata of a safetensors header; `header_facts` reads it back.

    A single key, because safetensors writes several in an order that changes from run to run.
    """
    return {_KEY: json.dumps(facts)}


def preamble(facts: Mapping[str, Any], tensors: Mapping[str, Form]) -> bytes:
    """Returns the bytes before the first tensor: the header of a file, with its length.

    The tensors follow in the order of `tensors`.
    """
    header: dict[str, Any] = {"__metadata__": metadata_of(facts)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + _DTYPES[dtype].itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def header_facts(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Returns the facts in the metadata of a header, empty if `metadata_of` did not write it."""
    try:
        facts = parse_json((metadata or {}).get(_KEY, "{}"))
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def read_header(path: Path, kind: Kind, *, expected_bytes: int | None = None) -> FoundHeader:
    """Returns the header of `path`; reads no tensor. Files of others have no `expected_bytes`.

    Raises DataError if the file is missing or not a safetensors file.
    """
    size = _size_of(path, kind)
    try:
        with path.open("rb") as opened:
            identity = Identity.of(opened.fileno())
            # safetensors checks the header strictly, but does not tell where tensors begin.
            with safe_open(path, framework="pt") as file:
                tensors = {name: _form(file, name) for name in file.keys()}
                header = Header(header_facts(file.metadata()), tensors, identity.size)
            length = int.from_bytes(opened.read(8), "little")
            document = parse_json(opened.read(length).decode())
        starts = {name: 8 + length + document[name]["data_offsets"][0] for name in tensors}
    except PermissionError as error:
        raise DataError(f"{path}: {error.strerror}; make it readable") from error
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        expected = "" if expected_bytes is None else f", the index says {expected_bytes}"
        raise DataError(
            f"{path}: not a readable {kind.name} ({error}); it has {size} bytes{expected}; "
            f"{kind.again}"
        ) from error
    return FoundHeader(header, StoredFile(path, identity, starts, kind.again))


def _size_of(path: Path, kind: Kind) -> int:
    """Returns the size of a file; raises DataError if there is none that can be read."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        found = None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; make it readable") from error
    # To open a pipe would wait for somebody to write into it.
    if found is None or not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path}: missing, but the index names it; {kind.again}")
    return found.st_size


def check_header(path: Path, kind: Kind, found: Header, expected: Header) -> None:
    """Checks a file against the index; raises DataError naming the first difference."""
    sizes = ({"bytes": found.num_bytes}, {"bytes": expected.num_bytes})
    pairs = {
        "header": (found.facts, expected.facts),
        "tensors": (found.tensors, expected.tensors),
        "size": sizes,
    }
    for what, (actual, wanted) in pairs.items():
        for name, value in wanted.items():
            if actual.get(name) != value:
                raise DataError(
                    f"{path}: the {what} of this {kind.name} and the index disagree about {name}: "
                    f"found {actual.get(name)}, the index says {value}; {kind.again}"
                )


def rows_of(tensors: Mapping[str, Form]) -> dict[str, Row]:
    """Returns the form of one sample, given those of the tensors of all samples in a file."""
    return {name: Row(_DTYPES[dtype], shape[1:]) for name, (dtype, shape) in tensors.items()}


def _form(file: safe_open, name: str) -> Form:
    view = file.get_slice(name)
    return view.get_dtype(), tuple(view.get_shape())
