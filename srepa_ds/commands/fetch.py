"""`srepa-ds fetch CONFIG`: downloads the published files that a configuration names, once.

Training, sampling and all other commands read what lies here and never download.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from srepa_ds.codec.config import CodecConfig
from srepa_ds.config.sections import EvaluateConfig, SampleConfig
from srepa_ds.encoders.extractors import ExtractorConfig
from srepa_ds.encoders.fetched import fetched_folder, read_fetched
from srepa_ds.encoders.publications import PUBLISHED, WEB_FILES, HubFiles, Published
from srepa_ds.encoders.published import find_published, model_to_fetch, web_file_named
from srepa_ds.encoders.teacher import TeacherConfig
from srepa_ds.errors import ConfigError, DataError, Fault
from srepa_ds.fetching.hub import plan_of
from srepa_ds.fetching.store import Plan, bring, check_space
from srepa_ds.fetching.web import web_plan_of
from srepa_ds.schema import Section
from srepa_ds.weights.initial import InitialWeightsConfig

log = logging.getLogger("srepa_ds")

E = TypeVar("E", ExtractorConfig, TeacherConfig)


class Named(NamedTuple):
    """Weights, or another published file, that a setting names."""

    setting: str
    published: Published | Path
    """A path is a file or folder of the user's own."""


class Row(NamedTuple):
    """A line of the list that the command prints."""

    setting: str
    name: str
    size: str
    state: str


def fetch(config: Section, *, dry_run: bool = False) -> str:
    """Returns the list of the files that `config` names, after fetching those that are missing.

    With `dry_run`, only lists them. Raises ConfigError for an encoder without weights, DataError
    for files that cannot be had, OutputError for a folder that cannot be written.
    """
    names = list(named_weights(config))
    # A document that cannot be read is a fault before anything is downloaded.
    read_fetched(fetched_folder())
    places = {named: _place(named) for named in names}
    # In the order of the file, each once.
    missing = dict.fromkeys(named.published for named in names if places[named] is None)
    plans = {published: _plan(published) for published in missing if _is_published(published)}
    check_space(list(plans.values()))
    if not dry_run:
        _bring_all(list(plans.values()))
    rows = [_row(named, places[named], plans, dry_run=dry_run) for named in names]
    return _table(rows) if rows else "it names no published files: there is nothing to fetch"


def named_weights(section: Section, place: str = "") -> Iterator[Named]:
    """Yields the weights of every codec and encoder in `section`, at its place in the file.

    And the published files that settings of an evaluation name. Raises ConfigError for an encoder
    without weights, DataError for weights that cannot be fetched.
    """
    if isinstance(section, CodecConfig):
        yield from _of_codec(section, place)
    if isinstance(section, ExtractorConfig):
        yield from _of_encoder(section, section.row.published, place)
    if isinstance(section, TeacherConfig):
        yield from _of_encoder(section, _published_of_teacher, place)
    if isinstance(section, SampleConfig):
        if section.decoder is not None:
            yield _of_vae(section.decoder, f"{place}.decoder")
        yield from _of_model(section.weights, f"{place}.weights")
        yield from _of_model(section.guide, f"{place}.guide")
    if isinstance(section, InitialWeightsConfig):
        yield from _of_model(section.path, f"{place}.path")
    if isinstance(section, EvaluateConfig):
        yield from _of_evaluation(section, place)
    for name in type(section).model_fields:
        value = getattr(section, name)
        items = enumerate(value) if isinstance(value, tuple) else [("", value)]
        for number, item in items:
            if isinstance(item, Section):
                keys = [key for key in (place, name, str(number)) if key]
                yield from named_weights(item, ".".join(keys))


def _of_codec(codec: CodecConfig, place: str) -> Iterator[Named]:
    if codec.weights is not None:
        yield _of_vae(codec.weights, f"{place}.weights")


def _of_vae(weights: Path, setting: str) -> Named:
    if weights.is_dir():
        return Named(setting, weights)
    try:
        return Named(setting, PUBLISHED["vae"](str(weights)))
    except DataError as error:
        raise DataError(f"{setting}: {error}") from error


def _of_model(path: Path | None, setting: str) -> Iterator[Named]:
    if path is not None and (published := model_to_fetch(path)):
        yield Named(setting, published)


def _of_encoder(encoder: E, published: Callable[[E], Published], place: str) -> Iterator[Named]:
    if fault := encoder.weights_fault():
        raise ConfigError("configuration", [Fault(f"{place}.{fault.path}", fault.message)])
    if encoder.weights is not None:
        yield Named(f"{place}.weights", encoder.weights)
    else:
        yield Named(place, published(encoder))


def _published_of_teacher(teacher: TeacherConfig) -> Published:
    return PUBLISHED["timm"](teacher.resolved.architecture)


def _of_evaluation(evaluate: EvaluateConfig, place: str) -> Iterator[Named]:
    for setting in ("samples", "reference"):
        path = getattr(evaluate, setting)
        if path is not None and (name := web_file_named(path)):
            yield Named(f"{place}.{setting}", WEB_FILES[name])


def _is_published(published: Published | Path) -> bool:
    return not isinstance(published, Path)


def _place(named: Named) -> Path | None:
    """Returns where the weights lie, None if they are missing or damaged."""
    if isinstance(named.published, Path):
        return named.published if named.published.exists() else None
    try:
        return find_published(named.published)
    except DataError as error:
        log.warning("%s is fetched again: %s", named.published.name, str(error).split("; ")[0])
        return None


def _plan(published: Published | Path) -> Plan:
    assert not isinstance(published, Path)
    return plan_of(published) if isinstance(published, HubFiles) else web_plan_of(published)


def _bring_all(plans: Sequence[Plan]) -> None:
    for plan in plans:
        log.info("fetching %s, %s, from %s", plan.published.name, _size(plan), plan.source)
        log.info("fetched %s", bring(plan))


def _row(named: Named, place: Path | None, plans: dict[Any, Plan], *, dry_run: bool) -> Row:
    if isinstance(named.published, Path):
        state = "your own" if place else "your own, and missing"
        return Row(named.setting, str(named.published), "", state)
    name = named.published.name
    note = _note(named.published)
    if place is not None:
        return Row(named.setting, name, "", f"in {place}{note}")
    plan = plans[named.published]
    folder = fetched_folder() / named.published.folder_name
    state = f"to be fetched from {plan.source}" if dry_run else f"in {folder}"
    return Row(named.setting, name, _size(plan), state + note)


def _note(published: Published) -> str:
    """Returns a remark for a file whose hash is not published, "" for any other."""
    if isinstance(published, HubFiles) or published.sha256 is not None:
        return ""
    return "; its publisher states no hash: that of the first download is kept and compared"


def _size(plan: Plan) -> str:
    size = plan.num_bytes
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _table(rows: Sequence[Row]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
