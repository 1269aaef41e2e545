"""Values that fields of an experiment cannot have: rows made from the schema itself."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from bad_input.arrangements import nothing
from bad_input.case import Case
from pydantic import AfterValidator
from pydantic.fields import FieldInfo

from srepa_ds.config.experiment import Config
from srepa_ds.schema import Section

# Fields of extractors are those of the teacher's; without the right kind, no other is looked at.
_SEEN_ELSEWHERE = ("evaluate.extractor.", "evaluate.further_extractors", "kind")
# A capital, which licences do not have.
_TEXT = "Nonsense"


def _cases() -> Iterator[Case]:
    """Yields a row per kind of value, in which all fields that take it are wrong at once."""
    wrong: dict[str, list[str]] = defaultdict(list)
    for path, field in _fields(Config):
        if not path.startswith(_SEEN_ELSEWHERE):
            for kind, value in _bad_values(field):
                wrong[kind].append(f"{path}={value}")
    for kind, overrides in wrong.items():
        words = tuple(f"{override.partition('=')[0]}: " for override in overrides)
        yield _case(f"{kind} in all fields", overrides, words)


def _typos() -> Iterator[Case]:
    """Yields a row per section, with a key that is nearly one of its own."""
    for path, field in _fields(Config):
        for section in _sections_in(field.annotation)[:1]:
            if not path.startswith(_SEEN_ELSEWHERE):
                first = next(iter(section.model_fields))
                typo = f"{_item(path, field)}.{first}{first[-1]}"
                words = (f"{typo}: unknown key; did you mean",)
                yield _case(f"a misspelt key of {path}", [f"{typo}=1"], words)


def _case(name: str, overrides: list[str], words: tuple[str, ...]) -> Case:
    return Case(name, nothing, f"config CONFIG {' '.join(overrides)}", words)


def _fields(section: type[Section], above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yields every field of a section and of those below it, by its `section.field` path."""
    for name, field in section.model_fields.items():
        path = above + name
        yield path, field
        for below in _sections_in(field.annotation):
            yield from _fields(below, f"{_item(path, field)}.")


def _item(path: str, field: FieldInfo) -> str:
    """Returns the path of a section; a list of sections has one item in the small experiment."""
    return f"{path}.0" if get_origin(field.annotation) is tuple else path


def _bad_values(field: FieldInfo) -> Iterator[tuple[str, str]]:
    kind, marks = _plain(field.annotation, field.metadata)
    if kind is bool:
        yield from (("a number for a truth", "1"), ("text for a truth", _TEXT))
    elif kind in (int, float):
        name = "whole number" if kind is int else "number"
        yield f"text for a {name}", _TEXT
        yield f"a huge {name}", "1e400"
        yield f"a truth for a {name}", "true"
        yield f"no {name}", "1.5" if kind is int else ".nan"
        least = [mark.ge - 1 for mark in marks if isinstance(mark, Ge)]
        least += [mark.gt for mark in marks if isinstance(mark, Gt)]
        yield from ((f"too small a {name}", str(value)) for value in least)
        most = [mark.le + 1 for mark in marks if isinstance(mark, Le)]
        most += [mark.lt for mark in marks if isinstance(mark, Lt)]
        yield from ((f"too large a {name}", str(value)) for value in most)
    elif kind is Path:
        yield from (("a number for a path", "5"), ("a list for a path", "[a]"))
    elif get_origin(kind) is Literal or any(isinstance(mark, AfterValidator) for mark in marks):
        yield from (("an unknown name", _TEXT), ("a number for a name", "7"))


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]


def _plain(annotation: Any, metadata: list[Any]) -> tuple[Any, list[Any]]:
    """Returns the type of an optional or annotated field, and its bounds."""
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return _plain(kinds[0], metadata) if len(kinds) == 1 else (None, [])
    if get_origin(annotation) is Annotated:
        kind, *marks = get_args(annotation)
        bounds = [m for mark in marks for m in getattr(mark, "metadata", [mark])]
        return _plain(kind, [*metadata, *bounds])
    return annotation, metadata


CASES = [*_cases(), *_typos()]
