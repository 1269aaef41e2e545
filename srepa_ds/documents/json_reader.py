"""Reads JSON within bounds, and strictly."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from srepa_ds.documents.yaml_reader import MOST_LEVELS, whole_number
from srepa_ds.files import read_document
from srepa_ds.trees import leaves


def read_json(path: Path) -> Any:
    """Returns the value of a JSON file; raises OSError, and ValueError as `parse_json` does."""
    return parse_json(read_document(path))


def parse_json(text: str) -> Any:
    """Returns the value of a JSON document.

    Raises ValueError if it is not JSON, gives a key twice, is nested too deeply, or holds text that
    is not Unicode or a whole number of more than 64 bits.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_twins, parse_int=whole_number)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _check_levels(value)
    if "\\ud" in text.lower():
        for path, leaf in leaves(value):
            # Half of a surrogate pair fails only later, when it is printed or written.
            f"{path}{leaf}".encode()
    return value


def _check_levels(value: Any) -> None:
    """Raises ValueError if there are more levels than functions that call themselves can bear."""
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [child for node in level for child in _children(node)]
    if any(isinstance(node, dict | list) for node in level):
        raise ValueError("it is nested too deeply")


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        ((twin, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key '{twin}' is given twice")
    return result
