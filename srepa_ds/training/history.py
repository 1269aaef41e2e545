"""`skipped.jsonl`: skipped steps and rollbacks. Append-only: a rollback never erases entries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from srepa_ds.distributed import ranks
from srepa_ds.errors import OutputError
from srepa_ds.files import despite_full_disk
from srepa_ds.run_folder import RunFolder
from srepa_ds.telemetry.json_lines import append_line, is_count, keep_lines, read_lines


@dataclass(frozen=True)
class PastRollbacks:
    """The rollbacks that still count: no checkpoint as late as their failed step is good."""

    count: int

    samples_seen: int
    """The furthest position in the data at which one of them failed; 0 if there is none."""


@ranks.main_rank_only
def clear_history(run: RunFolder) -> None:
    """Removes the history of an earlier run that left no checkpoint; raises OutputError."""
    with run.writing():
        run.skipped.unlink(missing_ok=True)


def add_skipped(
    run: RunFolder, step: int, *, not_finite: Sequence[str], sample_ids: Sequence[int]
) -> None:
    """Appends a skipped step: the terms that were not finite, and the samples of all ranks."""
    with despite_full_disk(run.skipped.name):
        append_line(run.skipped, {"step": step, "not_finite": not_finite, "sample_ids": sample_ids})


@ranks.main_rank_only
def add_rollback(run: RunFolder, failed_at: int, *, to: int, samples_seen: int) -> None:
    """Appends a rollback from step `failed_at` to the checkpoint of step `to`.

    Raises OutputError: a rollback that is not recorded would not count, and the run could repeat
    it forever.
    """
    with run.writing():
        line = {"step": failed_at, "rolled_back_to": to, "samples_seen": samples_seen}
        append_line(run.skipped, line)


@ranks.main_rank_only
def rollbacks_after(run: RunFolder, step: int) -> PastRollbacks:
    """Returns the rollbacks that count against a run whose newest good checkpoint is of `step`.

    A rollback counts until a checkpoint of the step that failed, or of a later one, is good. Sets
    damaged lines of the history aside, with a warning; raises OutputError if it cannot be read.
    """
    positions = [
        line["samples_seen"]
        for line in _entries(run)
        if "rolled_back_to" in line and line["step"] > step
    ]
    return PastRollbacks(len(positions), max(positions, default=0))


def _entries(run: RunFolder) -> list[Mapping[str, Any]]:
    """Returns the entries in order, and sets damaged lines aside.

    Raises OutputError if the file cannot be read: rollbacks would be forgotten.
    """
    try:
        lines = read_lines(run.skipped, is_entry)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(
            f"cannot read {run.skipped}, which counts the run's rollbacks: {error.strerror}; fix "
            "its permissions, or move it away to count from nought"
        ) from error
    if lines.bad:
        with despite_full_disk(run.skipped.name):
            keep_lines(lines, lines.good)
    return [line.value for line in lines.good]


def is_entry(line: Mapping[str, Any]) -> bool:
    """Returns whether an object is a line of the history."""
    if "rolled_back_to" in line:
        return all(map(is_count, (line.get("step"), line.get("samples_seen"))))
    return is_count(line.get("step")) and "sample_ids" in line
