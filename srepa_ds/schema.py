"""Strict configuration sections, and the way from a tree to a validated one.

Every component owns its `Section`; `config/` composes them. One validator, one error format, all
faults at once, whether a value came from a file or from the command line.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from srepa_ds.errors import ConfigError, Fault, nearest
from srepa_ds.trees import Tree, YamlDumper

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
    return yaml.dump(to_tree(config), Dumper=YamlDumper, sort_keys=False, width=100)


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
    dumped = yaml.dump(plain, Dumper=YamlDumper, default_flow_style=True, width=10_000).strip()
    return [f"{indent}{name}: {dumped.removesuffix('...').strip()}"]
