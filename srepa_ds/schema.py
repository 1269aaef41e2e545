"""Strict configuration sections, and the way from YAML and overrides to a validated tree.

Every module owns its `Section`; `config.py` composes them. One validator, one error format, all
faults at once, whether a value came from a file or from the command line.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from srepa_ds.errors import ConfigError, Fault, nearest

Tree = dict[str, Any]
S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A frozen group of settings; the string under each field is its documentation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def known_in(kind: str, table: Mapping[str, Any]) -> AfterValidator:
    """Returns a validator that accepts the names of `table` and suggests the nearest otherwise."""

    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"unknown {kind} '{name}'; {nearest(name, table)}")
        return name

    return AfterValidator(check)


class _Loader(yaml.SafeLoader):
    """YAML with plain scalars as in version 1.2: `1e-4` is a number, `2026-01-31` is text.

    A key that stands twice in one mapping is an error; PyYAML would drop the first without a word.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Returns the mapping of `node`; raises yaml.YAMLError if a key stands twice."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, name in enumerate(names):
            if name in names[:number]:
                place = f"line {node.value[number][0].start_mark.line + 1}"
                raise yaml.YAMLError(f"the key '{name}' stands twice, the second time in {place}")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as text."""


for _resolver in (_Loader, _Dumper):
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
    return yaml.load(text, Loader=_Loader)


def load_tree(path: Path) -> Tree:
    """Returns the tree of a YAML file, merged over the file its `base:` key names (if any).

    `base` is relative to the file itself; mappings merge key by key, anything else replaces.
    Raises ConfigError if a file is missing, is not YAML, is no mapping, or bases form a circle.
    """
    return _load(path, seen=())


def _load(path: Path, seen: tuple[Path, ...]) -> Tree:
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
        return tree
    return merged(_load(path.parent / str(base), (*seen, path.resolve())), tree)


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


CrossCheck = Callable[..., Iterable[Fault]]


def validated(
    schema: type[S],
    tree: Mapping[str, Any],
    *,
    source: str,
    cross_checks: Mapping[tuple[str, ...], Iterable[CrossCheck]] | None = None,
) -> S:
    """Returns the `schema` built from `tree`; raises ConfigError with every fault at once.

    `cross_checks` maps names of fields to functions of their values that yield faults. Each runs
    whenever the fields it needs are valid, even if others are not.
    """
    faults: list[Fault] = []
    config: S | None = None
    try:
        # By way of JSON, strict validation still accepts paths and tuples.
        config = schema.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        faults += [_fault(schema, detail) for detail in error.errors()]
    except TypeError as error:
        raise ConfigError(source, [Fault("", f"holds a value JSON cannot: {error}")]) from error
    parts = dict(config) if config is not None else _valid_parts(schema, tree)
    for names, checks in (cross_checks or {}).items():
        if all(name in parts for name in names):
            arguments = [parts[name] for name in names]
            faults += [fault for check in checks for fault in check(*arguments)]
    if faults or config is None:
        raise ConfigError(source, faults)
    return config


def _valid_parts(schema: type[Section], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `schema` that are valid on their own, defaults included."""
    parts = {}
    for name, field in schema.model_fields.items():
        if name not in tree and field.is_required():
            continue
        if name not in tree:
            parts[name] = field.get_default(call_default_factory=True, validated_data={})
            continue
        try:
            alone = schema.model_validate_json(json.dumps({name: tree[name]}))
        except ValidationError as error:
            if any(detail["loc"][:1] == (name,) for detail in error.errors()):
                continue
            alone = None
        parts[name] = getattr(alone, name) if alone else _field_value(schema, name, tree[name])
    return parts


def _field_value(schema: type[Section], name: str, value: Any) -> Any:
    """Returns one valid field's value although other required fields are missing."""
    from pydantic import create_model

    field = schema.model_fields[name]
    alone = create_model("Alone", __base__=Section, **{name: (field.annotation, field)})  # type: ignore[call-overload]
    return getattr(alone.model_validate_json(json.dumps({name: value})), name)


def _fault(schema: type[Section], detail: Any) -> Fault:
    location = detail["loc"]
    if detail["type"] == "extra_forbidden":
        place, fields = _located(schema, location[:-1])
        key = str(location[-1])
        return Fault(".".join([*place, key]), f"unknown key; {nearest(key, fields)}")
    path = ".".join(_located(schema, location)[0])
    if detail["type"] == "missing":
        return Fault(path, "is required")
    message = detail["msg"].removeprefix("Value error, ")
    given = detail.get("input")
    if isinstance(given, str | int | float | bool) and detail["type"] != "value_error":
        message += f" (given: {given!r})"
    return Fault(path, message)


def _located(schema: type[Section], location: Iterable[str | int]) -> tuple[list[str], list[str]]:
    """Returns pydantic's location as a path of ours, and the names of the fields known there.

    In a union pydantic adds the alternative it tried, such as `tuple[int, int]`: that is dropped.
    """
    sections, path = [schema], []
    for key in location:
        holders = [section for section in sections if key in section.model_fields]
        if holders:
            annotations = [section.model_fields[str(key)].annotation for section in holders]
            sections = [below for part in annotations for below in _sections_in(part)]
        if holders or isinstance(key, int):
            path.append(str(key))
    return path, [name for section in sections for name in section.model_fields]


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, tuple, list) or get_args(annotation):
        return [section for part in get_args(annotation) for section in _sections_in(part)]
    return []


def to_tree(config: Section) -> Tree:
    """Returns `config` as plain JSON values; `validated` of it gives an equal config."""
    return config.model_dump(mode="json")


def to_yaml(config: Section, *, documented: bool = False) -> str:
    """Returns `config` as YAML; with `documented`, every field's text stands above it."""
    if documented:
        return "\n".join(_documented(config, indent="")) + "\n"
    return yaml.dump(to_tree(config), Dumper=_Dumper, sort_keys=False, width=100)


def _documented(section: Section, indent: str) -> list[str]:
    lines = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        text = " ".join((field.description or "").split())
        lines += [f"{indent}# {text}"] if text else []
        lines += _documented_value(name, value, section, indent)
    return lines


def _documented_value(name: str, value: Any, section: Section, indent: str) -> list[str]:
    if isinstance(value, Section):
        return [f"{indent}{name}:", *_documented(value, indent + "  ")]
    if isinstance(value, tuple) and value and isinstance(value[0], Section):
        lines = [f"{indent}{name}:"]
        for item in value:
            body = _documented(item, indent + "    ")
            lines += [f"{indent}  -", *body]
        return lines
    plain = section.model_dump(mode="json", include={name})[name]
    dumped = yaml.dump(plain, Dumper=_Dumper, default_flow_style=True, width=10_000).strip()
    return [f"{indent}{name}: {dumped.removesuffix('...').strip()}"]
