"""Strict configuration sections: loading, validating and changing them.

Every component owns its `Section`; `config/` composes them. One validator, one error format, all
faults at once, whether a value came from a file or from the command line.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from srepa_ds.documents.yaml_reader import MOST_LEVELS
from srepa_ds.errors import ConfigError, Fault, nearest
from srepa_ds.files import expanded, unexpanded
from srepa_ds.trees import Tree, apply_overrides, load_files, merged, merged_files

_LOG = logging.getLogger("srepa_ds")

S = TypeVar("S", bound="Section")


@dataclass(frozen=True)
class OnlyFor:
    """Marks a field that only some choices have: `Annotated[float, OnlyFor("kind", "kl")]`.

    Several choices are given as a tuple. With another choice it must keep its default, as files of
    resolved settings do.
    """

    chooser: str
    """The field that makes the choice."""
    choice: str | tuple[str, ...]

    @property
    def choices(self) -> tuple[str, ...]:
        """The choices that have the field."""
        return (self.choice,) if isinstance(self.choice, str) else self.choice


class Section(BaseModel):
    """A frozen group of settings; the string under each field is its documentation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    former_names: ClassVar[Mapping[str, str]] = {}
    """Keys that fields had in earlier versions, and the fields they name; still accepted."""

    @field_validator("*", mode="after")
    @classmethod
    def _paths_are_expanded(cls, value: Any) -> Any:
        return _with_expanded_paths(value)

    @field_serializer("*", mode="wrap", when_used="json")
    def _paths_read_back(self, value: Any, otherwise: Callable[[Any], Any]) -> Any:
        if isinstance(value, Path):
            return unexpanded(value)
        is_paths = type(value) is tuple and all(isinstance(item, Path) for item in value)
        return [unexpanded(path) for path in value] if is_paths else otherwise(value)

    @model_validator(mode="after")
    def _has_only_settings_of_its_choices(self) -> "Section":
        for name, field in type(self).model_fields.items():
            for mark in field.metadata:
                if not isinstance(mark, OnlyFor) or getattr(self, name) == field.default:
                    continue
                # A field checked alone, because others are invalid, has no chooser beside it.
                chosen = getattr(self, mark.chooser, mark.choices[0])
                if chosen not in mark.choices:
                    quoted = " or ".join(f"'{choice}'" for choice in mark.choices)
                    raise ValueError(
                        f"{name} belongs to {mark.chooser} {quoted}, and {mark.chooser} is "
                        f"'{chosen}'; remove it, or set {mark.chooser}: {mark.choices[0]}"
                    )
        return self


def _with_expanded_paths(value: Any) -> Any:
    if isinstance(value, Path):
        return expanded(value)
    # Sections in a tuple have expanded their own.
    return tuple(map(_with_expanded_paths, value)) if type(value) is tuple else value


class MayChange:
    """Marks a field, as in `steps: Annotated[int, MayChange]`: a run may resume with another value.

    Such a value changes neither the model nor what it has learnt so far; or it is a path, and the
    files behind it are compared by their hashes. On a section it marks everything in the section.
    """


def may_change(schema: type[Section], path: str) -> bool:
    """Returns whether `MayChange` marks the setting at a `section.field` path, or one above it."""
    sections = [schema]
    for key in path.split("."):
        fields = [known[key] for section in sections if key in (known := section.model_fields)]
        if any(MayChange in field.metadata for field in fields):
            return True
        # A number is an item of a list, whose sections are already known.
        sections = sections if key.isdecimal() else _below(sections, key)
    return False


def one_of(kind: str, table: Mapping[str, Any]) -> AfterValidator:
    """Returns a validator that accepts the names of `table` and suggests the nearest otherwise."""

    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"unknown {kind} '{name}'; {nearest(name, table)}")
        return name

    return AfterValidator(check)


CrossCheck = Callable[..., Iterable[Fault]]


CrossChecks = Mapping[tuple[str, ...], Iterable[CrossCheck]]
"""Names of fields, and functions of their values that yield faults."""


def load_section(
    schema: type[S],
    path: Path,
    overrides: Iterable[str] = (),
    *,
    cross_checks: CrossChecks | None = None,
) -> S:
    """Returns the `schema` of a YAML file, edited by `section.field=value` overrides.

    Raises ConfigError with every fault at once. Logs a warning for each former name of a key.
    """
    files = load_files(path)
    return section_of(schema, files, overrides, source=str(path), cross_checks=cross_checks)


def section_of(
    schema: type[S],
    files: Iterable[Tree],
    overrides: Iterable[str] = (),
    *,
    source: str,
    cross_checks: CrossChecks | None = None,
) -> S:
    """Returns the `schema` of the trees that `load_files` returned; otherwise as `load_section`."""
    renamings: dict[str, str] = {}
    tree = merged_files(files, each=lambda file: with_current_names(schema, file, renamings))
    # Before they are applied: an override under the former name edits the value of the current one.
    current = [_current_override(schema, override, renamings) for override in overrides]
    tree = _with_lists(schema, tree, current)
    tree = with_current_names(schema, apply_overrides(tree, current), renamings)
    _check_kind(schema, tree, source)
    if os.environ.get("RANK", "0") == "0":
        for former, name in renamings.items():
            _LOG.warning("the key '%s' is now '%s'; please rename it", former, name)
    return validated(schema, tree, source=source, cross_checks=cross_checks)


COMMANDS_OF_KIND: Mapping[str, str] = {
    "experiment": "train (or export, sample, evaluate, sweep, report)",
    "prepare": "prepare",
    "teacher": "teacher",
    "parity": "parity",
}
"""The commands that take a file of a kind."""


def kind_of(tree: Mapping[str, Any]) -> Any:
    """Returns the kind of a file; one that names none is an experiment."""
    return tree.get("kind", "experiment")


def _check_kind(schema: type[Section], tree: Tree, source: str) -> None:
    """Raises ConfigError if the file is of a kind that another command takes."""
    field, kind = schema.model_fields.get("kind"), kind_of(tree)
    wanted = get_args(field.annotation) if field else ()
    if not wanted or kind in wanted or not isinstance(kind, str) or kind not in COMMANDS_OF_KIND:
        return
    # A file without a kind may be one that lacks only that.
    if "kind" in tree or {"model", "run"} & tree.keys():
        command, _, others = COMMANDS_OF_KIND[kind].partition(" ")
        advice = f"`srepa-ds {command} {source}`{' ' * bool(others)}{others}"
        message = f"this file is of kind '{kind}', not '{wanted[0]}'; run {advice}"
        raise ConfigError(source, [Fault("kind", message)])


def _with_lists(schema: type[Section], tree: Tree, overrides: Iterable[str]) -> Tree:
    """Returns `tree` with the default of each list that it lacks and an override has an item of."""
    for override in overrides:
        keys = override.partition("=")[0].split(".")
        for number, key in enumerate(keys):
            default = _default_list(schema, keys[:number]) if key.isdecimal() else None
            if default is not None:
                tree = merged(_nested(keys[:number], default), tree)
    return tree


def _default_list(schema: type[Section], keys: Iterable[str]) -> list[Any] | None:
    """Returns the default of the list at a path, or None if it has none."""
    sections, default = [schema], None
    for key in keys:
        known = [fields for section in sections if key in (fields := section.model_fields)]
        if isinstance(default, Section):
            default = getattr(default, key, None)
        else:
            default = known[0][key].get_default(call_default_factory=False) if known else None
        sections = _below(sections, key)
    # Plain values alone: sections have faults of their own.
    is_plain = isinstance(default, tuple) and not any(isinstance(v, Section) for v in default)
    return list(default) if is_plain else None


def _nested(keys: Iterable[str], value: Any) -> Tree:
    for key in reversed(list(keys)):
        value = {key: value}
    return value


def validated(
    schema: type[S],
    tree: Mapping[str, Any],
    *,
    source: str,
    cross_checks: CrossChecks | None = None,
) -> S:
    """Returns the `schema` built from `tree`; raises ConfigError with every fault at once.

    Former names of keys count as the current ones. Each cross-check runs whenever the fields it
    needs are valid, even if others are not.
    """
    tree = with_current_names(schema, tree)
    faults: list[Fault] = []
    config: S | None = None
    try:
        # Through JSON, strict validation still accepts paths and tuples.
        config = schema.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        faults += [_fault(schema, detail) for detail in error.errors()]
    except TypeError as error:
        raise ConfigError(source, [Fault("", f"holds a value JSON cannot: {error}")]) from error
    # Only for cross-checks, because it takes 20 ms for each field.
    parts = {} if not cross_checks else dict(config) if config else _valid_parts(schema, tree)
    for names, checks in (cross_checks or {}).items():
        if all(name in parts for name in names):
            arguments = [parts[name] for name in names]
            faults += [fault for check in checks for fault in check(*arguments)]
    if faults or config is None:
        raise ConfigError(source, faults)
    return config


def replaced(section: S, **changes: Any) -> S:
    """Returns `section` with some fields changed, validated; raises ValueError if it is invalid."""
    schema: type[S] = type(section)
    return schema.model_validate({**dict(section), **changes})


def with_current_names(
    schema: type[Section], tree: Mapping[str, Any], renamings: dict[str, str] | None = None
) -> Tree:
    """Returns `tree` with former names of keys replaced by the current ones.

    `renamings` receives their paths, former to current. A former name stays if the mapping has the
    current one too; `validated` then reports it.
    """
    return _renamed(tree, [schema], (), {} if renamings is None else renamings)


def _renamed(
    node: Any, sections: list[type[Section]], place: tuple[str, ...], renamings: dict[str, str]
) -> Any:
    if isinstance(node, list | tuple):
        numbered = enumerate(node)
        return [_renamed(value, sections, (*place, str(n)), renamings) for n, value in numbered]
    if not isinstance(node, Mapping) or not sections:
        return node
    result = {}
    for key, value in node.items():
        name = _former_names(sections).get(key, key)
        if name != key and name in node:
            name = key
        if name != key:
            _note(renamings, place, key, name)
        result[name] = _renamed(value, _below(sections, name), (*place, str(name)), renamings)
    return result


def _current_override(schema: type[Section], override: str, renamings: dict[str, str]) -> str:
    """Returns `override` with the current names of its keys."""
    path, equals, value = override.partition("=")
    if path.count(".") > MOST_LEVELS:
        # No such place exists, which `apply_overrides` says.
        return override
    sections, current = [schema], ()
    for key in path.split("."):
        name = _former_names(sections).get(key, key)
        if name != key:
            _note(renamings, current, key, name)
        # A number is an item of a list, whose sections are already known.
        sections = sections if key.isdecimal() else _below(sections, name)
        current = (*current, name)
    return f"{'.'.join(current)}{equals}{value}"


def _note(renamings: dict[str, str], place: tuple[str, ...], key: str, name: str) -> None:
    renamings[".".join((*place, key))] = ".".join((*place, name))


def _former_names(sections: Iterable[type[Section]]) -> dict[str, str]:
    return {key: name for section in sections for key, name in section.former_names.items()}


def _below(sections: Iterable[type[Section]], name: Any) -> list[type[Section]]:
    """Returns the sections that the field `name` of one of `sections` may hold."""
    fields = [known[name] for section in sections if name in (known := section.model_fields)]
    return [below for field in fields for below in _sections_in(field.annotation)]


def _valid_parts(schema: type[Section], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `schema` that are valid on their own, defaults included."""
    parts: dict[str, Any] = {}
    if not isinstance(tree, Mapping):
        return parts
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
    return getattr(_alone(schema, name).model_validate_json(json.dumps({name: value})), name)


@cache
def _alone(schema: type[Section], name: str) -> type[Section]:
    """Returns a section with one field of `schema`; pydantic takes long to make it."""
    from pydantic import create_model

    field = schema.model_fields[name]
    return create_model("Alone", __base__=Section, **{name: (field.annotation, field)})  # type: ignore[call-overload]


def _fault(schema: type[Section], detail: Any) -> Fault:
    location = detail["loc"]
    if detail["type"] == "extra_forbidden":
        place, sections = _located(schema, location[:-1])
        key = str(location[-1])
        path = ".".join([*place, key])
        if current := _former_names(sections).get(key):
            return Fault(path, f"is the former name of '{current}', and both are given; remove one")
        fields = [name for section in sections for name in section.model_fields]
        return Fault(path, f"unknown key; {nearest(key, fields)}")
    path = ".".join(_located(schema, location)[0])
    if detail["type"] == "union_tag_invalid":
        return _fault_of_tag(path, detail["ctx"])
    if detail["type"] == "union_tag_not_found":
        return Fault(f"{path}.{_unquoted(detail['ctx']['discriminator'])}", "is required")
    if detail["type"] == "missing":
        return Fault(path, "is required")
    message = detail["msg"].removeprefix("Value error, ")
    given = detail.get("input")
    if isinstance(given, str | int | float | bool) and detail["type"] != "value_error":
        message += f" (given: {_shortened(given)})"
    if detail["type"] in ("string_type", "path_type") and isinstance(given, int | float):
        message += "; put it in quotes"
    if detail["type"] == "bool_type" and str(given).lower() in ("yes", "no", "on", "off"):
        message += "; write true or false"
    if detail["type"] in ("int_type", "float_type") and re.fullmatch(r"[\d.]+(_\d+)+", str(given)):
        message += "; write the number without _"
    return Fault(path, message)


def _fault_of_tag(path: str, context: Mapping[str, Any]) -> Fault:
    """Returns the fault of a section whose kind is unknown."""
    tag, kinds = context["tag"], map(_unquoted, context["expected_tags"].split(","))
    field, section = _unquoted(context["discriminator"]), path.rpartition(".")[2]
    return Fault(f"{path}.{field}", f"unknown {section} '{tag}'; {nearest(tag, kinds)}")


def _unquoted(text: str) -> str:
    return text.strip(" '")


def _shortened(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:100]}..."


def _located(
    schema: type[Section], location: Iterable[str | int]
) -> tuple[list[str], list[type[Section]]]:
    """Returns pydantic's location as one of our paths, and the sections that may be there.

    In a union pydantic adds the alternative it tried, such as `tuple[int, int]`: it is dropped.
    """
    sections, path = [schema], []
    for key in location:
        is_field = any(key in section.model_fields for section in sections)
        if is_field:
            sections = _below(sections, key)
        if is_field or isinstance(key, int):
            path.append(str(key))
    return path, sections


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, tuple, list) or get_args(annotation):
        return [section for part in get_args(annotation) for section in _sections_in(part)]
    return []


def to_tree(config: Section) -> Tree:
    """Returns `config` as plain JSON values; `validated` of it gives an equal config."""
    return config.model_dump(mode="json")
