"""Trees of plain values: read from YAML and JSON, edited by overrides, flattened and compared."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from srepa_ds.errors import ConfigError, Fault
from srepa_ds.files import expanded, looked_for, read_document, reason_of, shipped_with_package

Tree = dict[str, Any]

MOST_LEVELS = 100
"""Mappings and lists inside each other, in YAML and in JSON."""

_MOST_VALUES = 10_000
_MOST_CHARACTERS = 1 << 18
"""Bounds of a YAML file, which PyYAML reads at some 100 kB per second."""

_TAG = "tag:yaml.org,2002:"

_PLAIN = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    ),
}
"""The plain scalars of YAML 1.2's core schema that are not text."""


class YamlLoader(yaml.SafeLoader):
    """Composes YAML with plain scalars as in version 1.2: `0100` is 100, and `yes` is text."""

    def __init__(self, text: str):
        if len(text) > _MOST_CHARACTERS:
            raise yaml.YAMLError(f"it has more than {_MOST_CHARACTERS >> 10} thousand characters")
        super().__init__(text)
        self._composed = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Returns the next node; raises yaml.YAMLError if there are too many."""
        self._composed += 1
        # Keys are nodes as well.
        if self._composed > 2 * _MOST_VALUES:
            raise _too_many_values()
        return super().compose_node(parent, index)

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """Notes a bracket or brace; raises yaml.YAMLError if there are too many inside each other.

        PyYAML looks ahead, which takes seconds for some thousand of them.
        """
        if self.flow_level > MOST_LEVELS:
            raise _too_deep()
        super().fetch_flow_collection_start(TokenClass)


class YamlDumper(yaml.SafeDumper):
    """Quotes text that `YamlLoader` would read as a number or another type."""

    def ignore_aliases(self, data: Any) -> bool:
        """Returns True: a value that lies at two places is written twice."""
        return True


for _resolver in (YamlLoader, YamlDumper):
    # Under None lie the patterns for texts of any first character.
    _resolver.yaml_implicit_resolvers = {
        None: [
            (_TAG + kind, re.compile(rf"(?:{pattern.pattern})\Z"))
            for kind, pattern in {**_PLAIN, "merge": re.compile("<<")}.items()
        ]
    }


def parse_yaml(text: str) -> Any:
    """Returns the value of a YAML document; raises yaml.YAMLError.

    Keys are text and given once. Aliases are separate values, so that an edit of one leaves the
    others alone.
    """
    try:
        loader = YamlLoader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        return None if node is None else _Builder().value(node)
    except RecursionError as error:
        raise _too_deep() from error
    except (ValueError, OverflowError) as error:
        # An escape such as "\\UFFFFFFFF" names no character.
        raise yaml.YAMLError(f"it holds an escape that is no character ({error})") from error


class _Builder:
    """Builds the plain values of composed nodes."""

    def __init__(self) -> None:
        self._built = 0
        self._above: list[yaml.Node] = []

    def value(self, node: yaml.Node) -> Any:
        """Returns the value of `node`; raises yaml.YAMLError."""
        self._built += 1
        if self._built > _MOST_VALUES:
            raise _too_many_values()
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if node in self._above:
            raise yaml.YAMLError(f"an alias stands for what it lies in{_line_of(node)}")
        if len(self._above) == MOST_LEVELS:
            raise _too_deep()
        self._above.append(node)
        built = self._mapping(node) if isinstance(node, yaml.MappingNode) else self._list(node)
        self._above.pop()
        return built

    def _list(self, node: yaml.Node) -> list[Any]:
        _check_tag(node, "seq")
        return [self.value(item) for item in node.value]

    def _mapping(self, node: yaml.MappingNode) -> Tree:
        _check_tag(node, "map")
        result: Tree = {}
        merged_in: list[Tree] = []
        for key_node, value_node in node.value:
            if _is_merge_key(key_node):
                merged_in += self._mappings(value_node)
                continue
            key = _scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                shown = f" {key_node.value!r}" if isinstance(key_node, yaml.ScalarNode) else ""
                raise yaml.YAMLError(
                    f"the key{shown} is not text; put it in quotes{_line_of(key_node)}"
                )
            if key in result:
                raise yaml.YAMLError(f"key '{key}' is given twice{_line_of(key_node)}")
            result[key] = self.value(value_node)
        for mapping in merged_in:
            result |= {key: value for key, value in mapping.items() if key not in result}
        return result

    def _mappings(self, node: yaml.Node) -> list[Tree]:
        """Returns the mappings that `<<` brings in; the first that has a key gives its value."""
        value = self.value(node)
        found = value if isinstance(value, list) else [value]
        if not all(isinstance(mapping, dict) for mapping in found):
            raise yaml.YAMLError(f"'<<' takes a mapping or a list of them{_line_of(node)}")
        return found


def _is_merge_key(node: yaml.Node) -> bool:
    # Of YAML 1.1, but in wide use with anchors; in quotes it is a key like any other.
    return node.tag == f"{_TAG}merge"


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    kind, text = node.tag.removeprefix(_TAG), node.value
    if kind in ("str", "merge"):
        return _whole_characters(text, node)
    if kind not in _PLAIN:
        raise _foreign_tag(node)
    if not _PLAIN[kind].fullmatch(text):
        raise yaml.YAMLError(f"{text!r} is no {kind}{_line_of(node)}")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    try:
        return _whole_number(text) if kind == "int" else _finite(text)
    except ValueError as error:
        raise yaml.YAMLError(f"{error}{_line_of(node)}") from error


def _whole_characters(text: str, node: yaml.Node) -> str:
    """Returns `text` with characters that were escaped as two halves, as JSON does, made whole."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise yaml.YAMLError(f"half of a character is escaped{_line_of(node)}") from error


def _whole_number(text: str) -> int:
    """Returns a decimal, `0o` or `0x` number; raises ValueError beyond 64 bits."""
    # Python refuses to read some 4,300 digits, and arithmetic in torch ends at 64 bits.
    if len(text.lstrip("+-0")) <= 24:
        number = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if -(1 << 63) <= number < 1 << 64:
            return number
    raise ValueError(f"the number {_shortened(text)} is too large")


def _finite(text: str) -> float:
    """Returns a float; raises ValueError if it is beyond the largest one, unless written `.inf`."""
    number = float(text.replace(".", "", 1) if text[-1] in "fFnN" else text)
    if math.isinf(number) and text[-1] not in "fF":
        raise ValueError(f"the number {_shortened(text)} is too large")
    return number


def _shortened(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:20]}... of {len(text)} characters"


def _check_tag(node: yaml.Node, kind: str) -> None:
    if node.tag != _TAG + kind:
        raise _foreign_tag(node)


def _foreign_tag(node: yaml.Node) -> yaml.YAMLError:
    tag = node.tag.replace(_TAG, "!!")
    return yaml.YAMLError(f"the tag {tag} means nothing here; remove it{_line_of(node)}")


def _too_deep() -> yaml.YAMLError:
    return yaml.YAMLError(f"it is nested more than {MOST_LEVELS} levels deep")


def _too_many_values() -> yaml.YAMLError:
    return yaml.YAMLError(f"it holds more than {_MOST_VALUES:,} values, each alias counted")


def _line_of(node: yaml.Node) -> str:
    return f" (line {node.start_mark.line + 1})"


def _in_words(error: Exception) -> str:
    """Returns what is wrong with a YAML document, and in which line, on one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        words = ", ".join(filter(None, (error.context, error.problem)))
        return f"{words} (line {error.problem_mark.line + 1})"
    return " ".join(str(error).replace('in "<unicode string>", ', "").split())


def read_json(path: Path) -> Any:
    """Returns the value of a JSON file; raises OSError, and ValueError as `parse_json` does."""
    return parse_json(read_document(path))


def parse_json(text: str) -> Any:
    """Returns the value of a JSON document.

    Raises ValueError if it is not JSON, gives a key twice, is nested too deeply, or holds text that
    is not Unicode or a whole number of more than 64 bits.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_twins, parse_int=_whole_number)
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
        raise ConfigError(str(named), [Fault("", f"not valid YAML: {_in_words(error)}")]) from error
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
            faults.append(Fault(path, f"{_shown(text)} is not valid YAML: {_in_words(error)}"))
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
