"""Trees of plain values: read from YAML and JSON, edited by overrides, flattened and compared."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from srepa_ds.errors import ConfigError, Fault
from srepa_ds.files import read_document

Tree = dict[str, Any]


class YamlLoader(yaml.SafeLoader):
    """YAML with plain scalars as in version 1.2: `1e-4` is a number, `2026-01-31` is text.

    A key given twice in one mapping is an error; PyYAML would silently drop the first.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Returns the mapping of `node`; raises yaml.YAMLError if a key is given twice."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, name in enumerate(names):
            if name in names[:number]:
                line = node.value[number][0].start_mark.line + 1
                raise yaml.YAMLError(f"key '{name}' is given twice (line {line})")
        return super().construct_mapping(node, deep)


class YamlDumper(yaml.SafeDumper):
    """Quotes text that `YamlLoader` would read as a number or another type."""


for _resolver in (YamlLoader, YamlDumper):
    _resolver.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
        for first, known in _resolver.yaml_implicit_resolvers.items()
    }
    _resolver.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"),
        list("-+0123456789."),
    )


def parse_yaml(text: str) -> Any:
    """Returns the value of a YAML document; raises yaml.YAMLError."""
    return yaml.load(text, Loader=YamlLoader)


def read_json(path: Path) -> Any:
    """Returns the value of a JSON file; raises OSError, and ValueError as `parse_json` does."""
    return parse_json(read_document(path))


def parse_json(text: str) -> Any:
    """Returns the value of a JSON document.

    Raises ValueError if it is not JSON, gives a key twice, is nested too deeply, or holds text that
    is not Unicode.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_twins)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if "\\ud" in text.lower():
        for path, leaf in leaves(value):
            # Half of a surrogate pair fails only later, when it is printed or written.
            f"{path}{leaf}".encode()
    return value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{twin}' is given twice")
    return result


def load_tree(path: Path, *, each: Callable[[Tree], Tree] = dict) -> Tree:
    """Returns the tree of a YAML file, merged over the file its `base:` key names (if any).

    `base` is relative to the file itself; mappings merge key by key, anything else replaces.
    `each` may change the tree of each file before they are merged.
    Raises ConfigError if a file is missing, is not YAML, is no mapping, or bases form a circle.
    """
    return _load(path, each, seen=())


def _load(path: Path, each: Callable[[Tree], Tree], seen: tuple[Path, ...]) -> Tree:
    if path.resolve() in seen:
        raise ConfigError(str(path), [Fault("base", "the chain of base files is a circle")])
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise ConfigError(
            str(path), [Fault("", f"{reason}; give the path of a YAML file")]
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [Fault("", f"not valid YAML: {error}")]) from error
    if not isinstance(tree, dict):
        raise ConfigError(str(path), [Fault("", "must be a mapping of sections")])
    base = tree.pop("base", None)
    if base is None:
        return each(tree)
    return merged(_load(path.parent / str(base), each, (*seen, path.resolve())), each(tree))


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
    result = _unshared(tree)
    faults = []
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            faults.append(Fault(override, "an override reads section.field=value"))
            continue
        try:
            _assign(result, path.split("."), parse_yaml(text))
        except yaml.YAMLError:
            faults.append(Fault(path, f"the value {text!r} is not valid YAML"))
        except (LookupError, TypeError, ValueError):
            faults.append(Fault(path, "addresses no place in the configuration"))
    if faults:
        raise ConfigError("command line", faults)
    return result


def _unshared(node: Any) -> Any:
    """Returns a copy in which a YAML anchor and its aliases are separate values."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(value) for value in node] if isinstance(node, list) else node


def _assign(node: Any, keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if isinstance(node, dict) and node.get(key) is None:
            # A section that is off, or left to its defaults, comes into being.
            node[key] = {}
        node = node[int(key) if isinstance(node, list) else key]
    if isinstance(node, list):
        node[int(keys[-1])] = value
    elif isinstance(node, dict):
        node[keys[-1]] = value
    else:
        raise TypeError(f"{keys[-1]} lies below a plain value")


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
