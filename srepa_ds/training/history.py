"""`skipped.jsonl`: skipped steps and rollbacks. Append-only: a rollback never erases entries."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srepa_ds.distributed import ranks
from srepa_ds.files import despite_full_disk
from srepa_ds.run_folder import RunFolder


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
        _append(run.skipped, {"step": step, "not_finite": not_finite, "sample_ids": sample_ids})


@ranks.main_rank_only
def add_rollback(run: RunFolder, failed_at: int, *, to: int, samples_seen: int) -> None:
    """Appends a rollback from step `failed_at` to the checkpoint of step `to`.

    Raises OutputError: a rollback that is not recorded would not count, and the run could repeat
    it forever.
    """
    with run.writing():
        line = {"step": failed_at, "rolled_back_to": to, "samples_seen": samples_seen}
        _append(run.skipped, line)


@ranks.main_rank_only
def rollbacks_after(run: RunFolder, step: int) -> PastRollbacks:
    """Returns the rollbacks that count against a run whose newest good checkpoint is of `step`.

    A rollback counts until a checkpoint of the step that failed, or of a later one, is good.
    """
    positions = [
        line["samples_seen"]
        for line in _lines(run.skipped)
        if "rolled_back_to" in line and line["step"] > step
    ]
    return PastRollbacks(len(positions), max(positions, default=0))


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield dict(json.loads(line))
        except (ValueError, TypeError):
            # A kill or a full disk may have torn it.
            continue


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("ab+") as file:
        torn = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read() != b"\n"
        file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")
