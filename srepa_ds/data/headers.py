"""Headers of safetensors files: written, read, and checked against an index."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from srepa_ds.errors import DataError
from srepa_ds.trees import parse_json

_KEY = "srepa_ds"

Form = tuple[str, tuple[int, ...]]
"""A tensor's dtype, in safetensors' spelling, and its shape."""


class Kind(NamedTuple):
    """A kind of file, for messages: its name, and the cure for a damaged one."""

    name: str
    again: str


class Header(NamedTuple):
    """A file's facts, the forms of its tensors, and its size in bytes."""

    facts: dict[str, Any]
    tensors: dict[str, Form]
    num_bytes: int


def metadata_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """Returns `facts` as metadata of a safetensors header; `header_facts` reads it back.

    A single key, because safetensors writes several in an order that changes from run to run.
    """
    return {_KEY: json.dumps(facts)}


def header_facts(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Returns the facts in the metadata of a header, empty if `metadata_of` did not write it."""
    try:
        facts = parse_json((metadata or {}).get(_KEY, "{}"))
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def read_header(path: Path, kind: Kind, *, expected_bytes: int) -> Header:
    """Returns the header of `path`; reads no tensor.

    Raises DataError if the file is missing or not a safetensors file.
    """
    if not path.is_file():
        raise DataError(f"{path}: missing, but the index names it; {kind.again}")
    size = path.stat().st_size
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: _form(file, name) for name in file.keys()}
            return Header(header_facts(file.metadata()), tensors, size)
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path}: not a readable {kind.name} ({error}); it has {size} bytes, "
            f"the index says {expected_bytes}; {kind.again}"
        ) from error


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


def _form(file: safe_open, name: str) -> Form:
    view = file.get_slice(name)
    return view.get_dtype(), tuple(view.get_shape())
