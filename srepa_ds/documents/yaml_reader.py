"""Reads YAML within bounds, with the plain scalars of version 1.2, and writes what reads back."""

import math
import re
from typing import Any

import yaml

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

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        _check_tag(node, "map")
        result: dict[str, Any] = {}
        merged_in: list[dict[str, Any]] = []
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

    def _mappings(self, node: yaml.Node) -> list[dict[str, Any]]:
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
        return whole_number(text) if kind == "int" else _finite(text)
    except ValueError as error:
        raise yaml.YAMLError(f"{error}{_line_of(node)}") from error


def _whole_characters(text: str, node: yaml.Node) -> str:
    """Returns `text` with characters that were escaped as two halves, as JSON does, made whole."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise yaml.YAMLError(f"half of a character is escaped{_line_of(node)}") from error


def whole_number(text: str) -> int:
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


def in_words(error: Exception) -> str:
    """Returns what is wrong with a YAML document, and in which line, on one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        words = ", ".join(filter(None, (error.context, error.problem)))
        return f"{words} (line {error.problem_mark.line + 1})"
    return " ".join(str(error).replace('in "<unicode string>", ', "").split())
