"""What a run has lost, in `skipped.jsonl`: steps it skipped, and its returns to a checkpoint.

The file outlives what it tells of: a return takes neither itself nor the failures before it back,
and a restarted run counts the returns of its predecessors.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srepa_ds.files import despite_full_disk
from srepa_ds.training.run_folder import writing

SKIPPED = "skipped.jsonl"
"""Name of the file in the run's folder."""


@dataclass(frozen=True)
class Setbacks:
    """The returns to a checkpoint that no later checkpoint has made good."""

    rollbacks: int
    """How many there were."""

    samples_seen: int
    """How far in the data the last of them failed; 0 if there is none."""


def begin_anew(folder: Path) -> None:
    """Removes what a run that left no checkpoint in `folder` has told; raises OutputError."""
    with writing(folder):
        (folder / SKIPPED).unlink(missing_ok=True)


def note_skipped(
    folder: Path, step: int, *, not_finite: Sequence[str], sample_ids: Sequence[int]
) -> None:
    """Appends a step that changed nothing, and the samples of all ranks it was to learn from."""
    with despite_full_disk(SKIPPED):
        _append(folder, {"step": step, "not_finite": not_finite, "sample_ids": sample_ids})


def note_rollback(folder: Path, failed_at: int, *, to: int, samples_seen: int) -> None:
    """Appends a return from step `failed_at` to the checkpoint of step `to`.

    Raises OutputError: what is not written would not be counted, and the run return for ever.
    """
    with writing(folder):
        _append(folder, {"step": failed_at, "rolled_back_to": to, "samples_seen": samples_seen})


def setbacks_after(folder: Path, step: int) -> Setbacks:
    """Returns what counts against a run whose newest good checkpoint is of `step`.

    A return is forgiven once a checkpoint of the step that had failed, or of a later one, is good.
    """
    positions = [
        line["samples_seen"]
        for line in _lines(folder)
        if "rolled_back_to" in line and line["step"] > step
    ]
    return Setbacks(len(positions), max(positions, default=0))


def _lines(folder: Path) -> Iterator[Mapping[str, Any]]:
    path = folder / SKIPPED
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield dict(json.loads(line))
        except (ValueError, TypeError):
            # A kill or a full disk may have torn it.
            continue


def _append(folder: Path, line: Mapping[str, Any]) -> None:
    with (folder / SKIPPED).open("ab+") as file:
        torn = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read() != b"\n"
        file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")
