"""`srepa-ds status RUN`: where a run is, its rate, its last checkpoint, its troubles."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

from srepa_ds.config.experiment import load_config
from srepa_ds.console import duration
from srepa_ds.metrics.scores import printed_names
from srepa_ds.preparation.estimate import size_text
from srepa_ds.report.status import LastCheckpoint, RunStatus, read_status

_WIDTH = 12


def status(path: Path, *, as_json: bool = False) -> str:
    """Returns what the files of a run tell, for people, or as a JSON object.

    `path` is the folder of a run, or the YAML file of an experiment. Raises ConfigError for a file
    with faults, and DataError if there is no run.
    """
    folder = load_config(path).run.folder if path.is_file() else path
    found = read_status(folder, now=time.time())
    if as_json:
        return json.dumps(found.as_json(), indent=2)
    return "\n".join([f"{found.folder}: {found.state}", *_rows(found)])


def _rows(found: RunStatus) -> Iterator[str]:
    share = f" ({found.step / found.total_steps:.1%})" if found.total_steps else ""
    yield _row("step", f"{found.step:,} of {found.total_steps:,}{share}")
    if found.step_seconds:
        yield _row("rate", _rate(found))
    if found.line_age_seconds is not None:
        losses = {k: v for k, v in found.last_line.items() if k.startswith("loss_") and v}
        shown = "".join(f"  {name} {value:.4g}" for name, value in losses.items())
        yield _row("last line", f"{_ago(found.line_age_seconds)}{shown}")
    yield _row("checkpoint", _checkpoint(found.checkpoint))
    if found.process:
        yield _row("process", found.process)
    if found.scores:
        names = printed_names("inception")
        shown = ", ".join(f"{names.get(k, k)} {v:.4g}" for k, v in found.scores.items())
        yield _row("scores", shown + (f" of {found.scores_of}" if found.scores_of else ""))
    for trouble in found.troubles or ("none",):
        yield _row("trouble", trouble)


def _rate(found: RunStatus) -> str:
    speed = "" if found.images_per_second is None else f"{found.images_per_second:,.1f} images/s, "
    left = "" if not found.remaining_seconds else f", {duration(found.remaining_seconds)} left"
    return f"{speed}{found.step_seconds:.3g} s a step{left}"


def _checkpoint(found: LastCheckpoint | None) -> str:
    if found is None:
        return "none yet"
    good = "good" if found.is_good else "not yet known to be good"
    kept = f"{found.count} kept, {size_text(found.num_bytes)} each"
    return f"step {found.step:,}, {_ago(found.age_seconds)}, {good}; {kept}"


def _ago(seconds: float) -> str:
    return f"{duration(max(0.0, seconds))} ago"


def _row(name: str, text: str) -> str:
    return f"  {name:<{_WIDTH}}{text}"
