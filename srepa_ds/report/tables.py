"""The sections of text and numbers: facts, settings, versions, timings, files."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from srepa_ds.config.experiment import Config
from srepa_ds.config.yaml_text import to_yaml
from srepa_ds.report.markup import Markup, details, element, joined, note, section, table
from srepa_ds.report.record import Line, is_drawable, training_seconds
from srepa_ds.schema import to_tree
from srepa_ds.training.resume import unsafe_changes

_MOST_FILES = 300


def facts(trained: Config, lines: Sequence[Line], *, parameters: int | None) -> Markup:
    """Returns the main facts about a run: model, teachers, length, speed, data, seed."""
    teachers = [alignment.teacher for alignment in trained.alignments]
    names = [teacher.name or teacher.resolved.architecture for teacher in teachers]
    steps = int(lines[-1]["step"])
    images = steps * trained.train.batch_size
    seconds = training_seconds(lines)
    size = "" if parameters is None else f", {parameters:,} parameters"
    length = f"{steps:,} of {trained.train.steps:,}, {trained.train.batch_size:,} images each"
    speed = f"{duration(seconds)}, {images / seconds:,.0f} images/s" if seconds else "not recorded"
    rows = [
        ("model", f"{trained.model.variant}{size}"),
        ("teacher", ", ".join(names) or "none"),
        ("steps", length),
        ("training time", speed),
        ("data", str(trained.data.folder)),
        ("seed", str(trained.run.seed)),
    ]
    return table(rows)


def config_section(trained: Config, given: Config) -> Markup:
    """Returns the configuration the run was trained with, and where `given` differs from it."""
    faults = unsafe_changes(to_tree(trained), given)
    changes = [f"{fault.path}: {fault.message}" for fault in faults]
    notes = [
        note(f"The settings given differ from those the run was trained with: {'; '.join(changes)}")
    ]
    body = details(given.run_folder.config.name, to_yaml(trained))
    return section("config", "Configuration", *(notes if changes else ()), body)


def environment_section(environment: Mapping[str, Any]) -> Markup:
    """Returns the versions and the machine of the training."""
    rows = []
    for name, value in environment.items():
        text = shlex.join(map(str, value)) if isinstance(value, list) else number(value)
        rows.append((name.replace("world_size", "ranks"), text))
    return section("environment", "Versions and machine", table(rows))


def timings_section(timings: Mapping[str, Any]) -> Markup:
    """Returns the time of each command, and the total."""
    measured = {name: float(s) for name, s in timings.items() if is_drawable(s)}
    rows = [(name, duration(seconds)) for name, seconds in measured.items()]
    return section(
        "timings", "Timings", table([*rows, ("total", duration(sum(measured.values(), 0.0)))])
    )


def files_section(folder: Path, *, without: Path) -> Markup:
    """Returns the files in the run's folder with their sizes, except the page itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != without)
    rows = [(str(path.relative_to(folder)), size(path.stat().st_size)) for path in files]
    more = len(rows) - _MOST_FILES
    rest = element("p", f"and {more:,} more", class_="soft") if more > 0 else Markup()
    summary = f"{len(files):,} in {folder}"
    body = joined(table(rows[:_MOST_FILES]), rest)
    return section("files", "Files", element("details", element("summary", summary), body))


def number(value: Any) -> str:
    """Returns a value of a document formatted for reading."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)


def duration(seconds: float) -> str:
    """Returns a time in its two largest units."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def size(num_bytes: int) -> str:
    """Returns a number of bytes in a unit of its size."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
