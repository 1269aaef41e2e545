"""Where a run is, from its files alone: nothing in its folder is touched, and no rank is asked."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from srepa_ds.checkpoint.folder import ASIDE, named, step_of, steps_in
from srepa_ds.checkpoint.manifest import MANIFEST
from srepa_ds.checkpoint.retention import FAILED, is_good
from srepa_ds.errors import DataError
from srepa_ds.files import holder_of
from srepa_ds.preparation.estimate import size_text
from srepa_ds.report.record import is_drawable, part, read_document
from srepa_ds.run_folder import RunFolder
from srepa_ds.telemetry.json_lines import read_lines
from srepa_ds.telemetry.metrics_log import is_metrics
from srepa_ds.training.history import is_entry
from srepa_ds.trees import Tree, load_tree

State = Literal["training", "finished", "stopped", "silent", "not begun"]

# Lines of the record come at even steps, but checkpoints, pictures and distances come between.
_LINES_MISSED = 5
_LEAST_SILENCE = 300.0
_RECENT_LINES = 10
_SAVES_OF_ROOM = 2


@dataclass(frozen=True)
class LastCheckpoint:
    """The newest checkpoint that has its manifest; its contents are not compared."""

    step: int
    is_good: bool
    """Whether a later step was applied."""
    age_seconds: float
    num_bytes: int
    count: int
    """How many there are."""


@dataclass(frozen=True)
class RunStatus:
    """Where a run is."""

    folder: str
    state: State
    """`training`: a process of this machine holds the folder, or lines of the record come in time.
    `silent`: a process holds it, but lines are overdue."""

    step: int
    """The last step of the record."""

    total_steps: int
    process: str | None
    """The process of this machine that holds the folder."""

    line_age_seconds: float | None
    """Since the last line of the record."""

    images_per_second: float | None
    """Over the last lines of the record."""

    step_seconds: float | None
    remaining_seconds: float | None
    """At that rate."""

    last_line: Mapping[str, float]
    """The last line of the record."""

    checkpoint: LastCheckpoint | None
    scores: Mapping[str, float]
    scores_of: str | None
    """The images that the scores are of."""

    troubles: tuple[str, ...]
    """What a person should look at."""

    def as_json(self) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        return asdict(self)


def read_status(folder: Path, *, now: float) -> RunStatus:
    """Returns where the run in `folder` is at the time `now`, in seconds since the epoch.

    Raises DataError if there is no run, or its files cannot be read.
    """
    run = RunFolder(folder)
    config = _config(run)
    try:
        return _status(run, config, now)
    except OSError as error:
        place = error.filename or folder
        raise DataError(f"{place}: {error.strerror or error}; fix its permissions") from error


def _config(run: RunFolder) -> Tree:
    if not run.config.is_file():
        raise DataError(
            f"{run.path}: holds no run (there is no {run.config.name}, which `srepa-ds train` "
            "writes); give the run.folder of an experiment"
        )
    return load_tree(run.config)


def _status(run: RunFolder, config: Tree, now: float) -> RunStatus:
    total, every = _counts(config)
    lines = _lines(run)
    timed = [line for line in lines if line.get("step_seconds")][-_RECENT_LINES:]
    seconds = _mean(line["step_seconds"] for line in timed)
    checkpoint = _checkpoint(run, now)
    # An imported run has a checkpoint and no record.
    step = max(int(lines[-1]["step"]) if lines else 0, checkpoint.step if checkpoint else 0)
    age = now - run.metrics.stat().st_mtime if lines else None
    process = holder_of(run.path)
    due = max(_LEAST_SILENCE, _LINES_MISSED * every * seconds) if seconds else _LEAST_SILENCE
    # A run that starts again writes its configuration long before its first line.
    quiet = now - max(path.stat().st_mtime for path in (run.config, run.metrics) if path.exists())
    is_overdue = quiet > due
    state = _state(lines, step, total, process=process, is_overdue=is_overdue)
    results = read_document(run.results) if run.results.is_file() else {}
    troubles = [
        *_troubles_of_steps(run),
        *_troubles_of_files(run, checkpoint, is_held=process is not None),
    ]
    if state == "silent":
        troubles.insert(
            0, f"no line of the record for {quiet:.0f} s, where one was due in {due:.0f}"
        )
    return RunStatus(
        folder=str(run.path),
        state=state,
        step=step,
        total_steps=total,
        process=process,
        line_age_seconds=age,
        images_per_second=_mean(x["images_per_second"] for x in timed if "images_per_second" in x),
        step_seconds=seconds,
        remaining_seconds=None if seconds is None else seconds * max(0, total - step),
        last_line=lines[-1] if lines else {},
        checkpoint=checkpoint,
        scores={k: float(v) for k, v in part(results, "scores").items() if is_drawable(v)},
        scores_of=_samples_of(results),
        troubles=tuple(troubles),
    )


def _state(
    lines: Sequence[Any], step: int, total: int, *, process: str | None, is_overdue: bool
) -> State:
    if lines and step >= total:
        return "finished"
    if process is not None:
        return "silent" if is_overdue else "training"
    if not lines:
        return "stopped" if step else "not begun"
    # Its processes may be on other machines.
    return "stopped" if is_overdue else "training"


def _counts(config: Tree) -> tuple[int, int]:
    """Returns the steps in total, and between lines of the record."""
    train = config.get("train")
    train = train if isinstance(train, dict) else {}
    total, every = train.get("steps", 0), train.get("log_every_steps", 50)
    return (total if isinstance(total, int) else 0), (every if isinstance(every, int) else 50)


def _lines(run: RunFolder) -> list[dict[str, float]]:
    """Returns the lines of the record; none of a run that has not written any."""
    if not run.metrics.is_file():
        return []
    good = read_lines(run.metrics, is_metrics).good
    return [{k: float(v) for k, v in line.value.items() if is_drawable(v)} for line in good]


def _mean(values: Iterator[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def _checkpoint(run: RunFolder, now: float) -> LastCheckpoint | None:
    whole = [folder for folder in steps_in(run.checkpoints) if (folder / MANIFEST).is_file()]
    if not whole:
        return None
    newest = whole[-1]
    return LastCheckpoint(
        step=step_of(newest),
        is_good=is_good(newest),
        age_seconds=now - (newest / MANIFEST).stat().st_mtime,
        num_bytes=sum(path.stat().st_size for path in newest.iterdir()),
        count=len(whole),
    )


def _samples_of(results: Mapping[str, Any]) -> str | None:
    step = part(results, "samples").get("step")
    return None if step is None else f"step {step}"


def _troubles_of_steps(run: RunFolder) -> Iterator[str]:
    if not run.skipped.is_file():
        return
    lines = read_lines(run.skipped, is_entry)
    entries = [line.value for line in lines.good]
    skipped = [entry for entry in entries if "rolled_back_to" not in entry]
    rolled = [entry for entry in entries if "rolled_back_to" in entry]
    if skipped:
        terms = sorted({str(name) for name in skipped[-1].get("not_finite") or ()})
        what = f" ({', '.join(terms)} not finite)" if terms else ""
        yield f"{_count(skipped, 'skipped step')}, the last {skipped[-1]['step']}{what}"
    if rolled:
        last = rolled[-1]
        steps = f"from {last['step']} to {last['rolled_back_to']}"
        yield f"{_count(rolled, 'rollback')}, the last {steps}"


def _troubles_of_files(
    run: RunFolder, checkpoint: LastCheckpoint | None, *, is_held: bool
) -> Iterator[str]:
    failed = named(run.checkpoints, FAILED)
    if failed:
        yield f"{_count(failed, 'checkpoint')} of steps that failed: {failed[-1].name}"
    torn = [p.name for p in steps_in(run.checkpoints) if not (p / MANIFEST).is_file()]
    if torn:
        yield f"checkpoints without a manifest, which nothing resumes from: {', '.join(torn)}"
    # While a process trains, a save may be under way.
    for unfinished in () if is_held else sorted(run.checkpoints.glob(f"{ASIDE}*")):
        yield f"a save that was interrupted: {unfinished.name}"
    if bad := [p.name for p in run.path.glob("*.bad") if re.fullmatch(r"\w+\.jsonl\.bad", p.name)]:
        yield f"damaged lines were set aside: {', '.join(sorted(bad))}"
    free = shutil.disk_usage(run.path).free
    if checkpoint and free < _SAVES_OF_ROOM * checkpoint.num_bytes:
        needed = size_text(checkpoint.num_bytes)
        yield f"{size_text(free)} are free on the disk, and a checkpoint takes {needed}"


def _count(found: Sequence[object], what: str) -> str:
    return f"{len(found)} {what}{'s' if len(found) != 1 else ''}"
