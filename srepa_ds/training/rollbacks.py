"""Handles steps that are not finite: names their samples, rolls the run back, or gives up.

`docs/training.md` has the rules in the order in which they apply.
"""

import logging
import math
from dataclasses import dataclass

import torch

from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.checkpoint.retention import rollback_point
from srepa_ds.checkpoint.writer import CheckpointWriter
from srepa_ds.config.experiment import Config
from srepa_ds.distributed import ranks
from srepa_ds.engine import Engine, StepReport
from srepa_ds.errors import DataError, DivergedError, raised_on_all_ranks
from srepa_ds.training.feed import Feed
from srepa_ds.training.history import add_rollback, add_skipped, rollbacks_after

log = logging.getLogger("srepa_ds")

_TERMS = ("flow", "pointwise", "structural", "cls")
_CURE = "resume with a smaller optimizer.learning_rate or engine.precision=fp32"


@dataclass
class Rollbacks:
    """Explains skipped steps and rolls a run back. Every method is collective."""

    config: Config
    engine: Engine
    feed: Feed
    writer: CheckpointWriter
    is_main: bool

    def explain(self, report: StepReport) -> None:
        """Logs which terms of a skipped step were not finite, and records its samples.

        Raises DataError if a teacher is at fault: frozen, it would fail in every epoch.
        """
        by_rank = ranks.gather((self.feed.unusable(), self.feed.sample_ids()))
        _check_teachers(self.config, [unusable for unusable, _ in by_rank])
        losses = report.losses._asdict()
        values = ranks.averaged(torch.stack([losses[name] for name in _TERMS])).tolist()
        culprits = [n for n, value in zip(_TERMS, values, strict=True) if not math.isfinite(value)]
        culprits = culprits or ["gradient"]
        sample_ids = [number for _, ids in by_rank for number in ids]
        if self.is_main:
            step = self.engine.step_count
            log.warning("step %d skipped: %s not finite", step, ", ".join(culprits))
            add_skipped(self.config.run_folder, step, not_finite=culprits, sample_ids=sample_ids)

    def roll_back(self) -> int:
        """Rolls back to the last good checkpoint and returns its step; the data is not rewound.

        Raises DivergedError without a checkpoint, or after too many rollbacks.
        """
        engine, run, failed_at = self.engine, self.config.run_folder, self.engine.step_count
        self.writer.wait()
        point = ranks.on_main(rollback_point, run.checkpoints)
        if point is None:
            raise self._diverged(f"and there {self._save_without_checkpoint()}")
        reader = ranks.together(CheckpointReader, point.folder)
        step, samples_seen = reader.state["step"], engine.samples_seen
        past, allowed = rollbacks_after(run, step).count, self.config.train.max_rollbacks
        if past >= allowed:
            verdict = "is good" if point.is_good else "may be bad itself: no step from it was taken"
            count = f"{past} rollback{'' if past == 1 else 's'}"
            raise self._diverged(f"after {count}; {point.folder.name} {verdict}")
        add_rollback(run, failed_at, to=step, samples_seen=samples_seen)
        engine.restore(reader)
        # The data continues after the failed samples, which would only fail again.
        engine.samples_seen = samples_seen
        self.feed.continue_at(step)
        self.writer.restart_at(step)
        if self.is_main:
            count = f"{past + 1} of {allowed} allowed"
            log.warning("rolled back from step %d to %s (%s)", failed_at, point.folder, count)
        return step

    def _save_without_checkpoint(self) -> str:
        """Saves a run without checkpoints if only its last steps failed; returns what to tell."""
        engine, last_applied = self.engine, self.writer.last_applied
        if engine.step_count - last_applied >= self.config.train.max_skipped_steps:
            return "is no checkpoint yet"
        self.writer.save(step=engine.step_count, pieces=engine.pieces(), state=engine.state())
        self.writer.wait()
        return f"was no checkpoint to roll back to; step {last_applied} is saved as the last"

    def _diverged(self, circumstances: str) -> DivergedError:
        text = (
            f"steps {self.writer.last_applied + 1} to {self.engine.step_count} were not finite, "
            f"{circumstances}; the samples are listed in {self.config.run_folder.skipped}: look at "
            f"them, or {_CURE}"
        )
        return raised_on_all_ranks(DivergedError(text))


def diverged_record(names: list[str], step: int) -> DivergedError:
    """Returns the error for values of the record that are not finite although no step was skipped.

    All ranks must raise it.
    """
    return raised_on_all_ranks(
        DivergedError(f"{', '.join(names)} not finite up to step {step}; {_CURE}")
    )


def _check_teachers(config: Config, by_rank: list[dict[int, list[int]]]) -> None:
    """Raises DataError, on all ranks, for samples whose tokens of a teacher are not finite."""
    for number, alignment in enumerate(config.alignments):
        sample_ids = sorted({i for found in by_rank for i in found.get(number, [])})
        if not sample_ids:
            continue
        teacher = alignment.teacher
        shown = ", ".join(map(str, sample_ids[:10])) + (", ..." if len(sample_ids) > 10 else "")
        text = (
            f"alignments.{number}.teacher: '{teacher.name or teacher.resolved.architecture}' gives "
            f"tokens that are not finite for sample(s) {shown} of {config.data.folder}; check its "
            "weights, or set its dtype to fp32"
        )
        raise raised_on_all_ranks(DataError(text))
