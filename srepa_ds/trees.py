"""Trees of plain values: loaded from YAML files, edited by overrides, flattened and compared."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from srepa_ds.documents.yaml_reader import MOST_LEVELS, in_words, parse_yaml
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.files import expanded, looked_for, read_document, reason_of, shipped_with_package

Tree = dict[str, Any]


def load_tree(path: Path, *, each: Callable[[Tree], Tree] = dict) -> Tree:
    """Returns the tree of a YAML file, merged over the file its `base:` key names (if any).

    `each` may change the tree of each file before they are merged. Raises what `load_files` does.
    """
    return merged_files(load_files(path), each=each)


def merged_files(files: Iterable[Tree], *, each: Callable[[Tree], Tree] = dict) -> Tree:
    """Returns the trees of `load_files` as one; `each` changes every one of them before."""
    return reduce(merged, map(each, files))


def load_files(path: Path) -> list[Tree]:
    """Returns the trees of a YAML file and of the chain of files its `base:` names, that first.

    Each file is opened once: it may be a pipe. `base` is relative to the file itself; mappings are
    to be merged key by key, anything else replaces. A name without a file may be one shipped with
    the package. Raises ConfigError if a file is missing, is not YAML, is no mapping, or bases form
    a circle.
    """
    files: list[Tree] = []
    seen: set[str] = set()
    named, beside = path, Path()
    while True:
        found = _located(named, beside)
        if os.path.realpath(found) in seen:
            raise ConfigError(str(named), [Fault("base", "the chain of base files is a circle")])
        seen.add(os.path.realpath(found))
        tree = _read_file(named, found)
        base = tree.pop("base", None)
        files.insert(0, tree)
        if base is None:
            return files
        if not isinstance(base, str):
            raise ConfigError(str(named), [Fault("base", "must be the path of a YAML file")])
        named, beside = Path(base), found.parent


def _located(named: Path, beside: Path) -> Path:
    """Returns the place of the file `named` in a file of the folder `beside`."""
    try:
        found = beside / expanded(named)
    except ValueError as error:
        raise ConfigError(str(named), [Fault("", str(error))]) from error
    if os.path.exists(found) or named.is_absolute():
        return found
    return shipped_with_package(named) or found


def _read_file(named: Path, found: Path) -> Tree:
    try:
        tree = parse_yaml(read_document(found))
    except OSError as error:
        reason = f"{reason_of(error)}{looked_for(named, found)}"
        raise ConfigError(
            str(named), [Fault("", f"{reason}; give the path of a YAML file")]
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(str(named), [Fault("", f"not valid YAML: {in_words(error)}")]) from error
    if not isinstance(tree, dict):
        raise ConfigError(str(named), [Fault("", "must be a mapping of sections")])
    return tree


def merged(base: Tree, changes: Mapping[str, Any]) -> Tree:
    """Returns `base` with `changes` laid over it, mappings merged key by key."""
    result = dict(base)
    for key, value in changes.items():
        below = result.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        result[key] = merged(below, value) if both else value
    return result


def apply_overrides(tree: Tree, overrides: Iterable[str]) -> Tree:
    """Returns a copy of `tree` edited by `section.field=value` strings; values are YAML.

    List items are addressed by number (`alignments.0.depth=4`). Raises ConfigError naming every
    override that is malformed or addresses no place.
    """
    result = _copied(tree)
    faults = []
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            faults.append(Fault(override, "an override reads section.field=value"))
            continue
        try:
            _assign(result, path.split("."), parse_yaml(text))
        except yaml.YAMLError as error:
            faults.append(Fault(path, f"{_shown(text)} is not valid YAML: {in_words(error)}"))
        except LookupError as error:
            faults.append(Fault(path, f"addresses no place in the configuration: {error.args[0]}"))
    if faults:
        raise ConfigError("command line", faults)
    return result


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:60]}...")


def _copied(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _copied(value) for key, value in node.items()}
    return [_copied(value) for value in node] if isinstance(node, list) else node


def _assign(node: Any, keys: list[str], value: Any) -> None:
    """Sets the value under `keys`; raises LookupError that says why there is no such place."""
    if len(keys) > MOST_LEVELS:
        raise LookupError("it has too many parts")
    for level, key in enumerate(keys[:-1]):
        if isinstance(node, dict) and node.get(key) is None:
            # A section that is off, or left to its defaults, comes into being.
            node[key] = {}
        node = node[_place_in(node, key, keys[:level])]
    node[_place_in(node, keys[-1], keys[:-1])] = value


def _place_in(node: Any, key: str, above: list[str]) -> str | int:
    """Returns `key` as `node`, which lies under `above`, is addressed by it."""
    name = ".".join(above) or "the whole file"
    if isinstance(node, dict):
        return key
    if not isinstance(node, list):
        raise LookupError(f"{name} is a plain value")
    if not re.fullmatch(r"[0-9]{1,9}", key):
        raise LookupError(f"{name} is a list, and its items are addressed by number, from 0")
    if int(key) >= len(node):
        items = f"{len(node)} item{'s' if len(node) != 1 else ''}"
        raise LookupError(f"{name} has {items}, numbered from 0; to add one, write {name}=[...]")
    return int(key)


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (`section.field` path, value) for every plain value of a tree, below `path`."""
    if isinstance(node, dict | list) and node:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


class Difference(NamedTuple):
    """A plain value that differs between two trees; None where a tree lacks it."""

    path: str
    old: Any
    new: Any


def differences(old: Any, new: Any) -> list[Difference]:
    """Returns the values that differ between two trees, in the order of the trees.

    A filled mapping or list differs from an empty one by the values in it.
    """
    old_leaves, new_leaves = dict(leaves(old)), dict(leaves(new))
    paths = old_leaves | new_leaves
    found = [Difference(path, old_leaves.get(path), new_leaves.get(path)) for path in paths]
    return [
        difference
        for difference in found
        if difference.old != difference.new
        and not (paths[difference.path] in ({}, []) and _has_leaves_below(difference.path, paths))
    ]


def _has_leaves_below(path: str, paths: Iterable[str]) -> bool:
    below = f"{path}." if path else ""
    return any(other != path and other.startswith(below) for other in paths)
