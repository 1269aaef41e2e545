"""The loop of a training run: one step after another, and what is due after each."""

import logging
from dataclasses import dataclass

from srepa_ds.checkpoint.writer import CheckpointWriter
from srepa_ds.config.sections import TrainConfig
from srepa_ds.distributed import ranks
from srepa_ds.engine import Engine
from srepa_ds.optim.adamw import OptimizerConfig
from srepa_ds.optim.learning_rate import learning_rate
from srepa_ds.training.claim import Claim
from srepa_ds.training.content_watch import ContentWatch
from srepa_ds.training.feed import Feed
from srepa_ds.training.monitor import Monitor
from srepa_ds.training.records import Records
from srepa_ds.training.rollbacks import Rollbacks, diverged_record

log = logging.getLogger("srepa_ds")

# Asking all ranks costs a collective and, on a GPU, a wait for the device.
_STOP_CHECK_STEPS = 5


@dataclass
class TrainingLoop:
    """The parts of a run, and the order in which they act."""

    train: TrainConfig
    optimizer: OptimizerConfig
    engine: Engine
    feed: Feed
    records: Records
    monitor: Monitor
    writer: CheckpointWriter
    rollbacks: Rollbacks
    contents: ContentWatch
    claim: Claim
    stop: list[int]
    """Signals received by this rank."""

    def run(self) -> bool:
        """Trains up to the last step, or saves early on a signal; returns whether it is finished.

        Raises DivergedError if rollbacks do not help against values that are not finite, and
        DataError if a teacher gives such values or the data turn out to be damaged, and OutputError
        if the run's folder goes away.
        """
        engine, writer, total = self.engine, self.writer, self.train.steps
        if engine.step_count >= total:
            log.info("already trained to step %d, nothing to do", engine.step_count)
        else:
            ranks.together(self.feed.open)

        while engine.step_count < total:
            # Take a step.
            rate = learning_rate(self.optimizer, engine.step_count)
            report = engine.step(self.feed.step(), learning_rate=rate)
            step, is_last = engine.step_count, engine.step_count == total
            self.records.add(report, waited=self.feed.waited())
            if not report.applied:
                if self._data_failed():
                    break
                self.rollbacks.explain(report)

            # Write a line of the record.
            if is_last or step % self.train.log_every_steps == 0:
                self._write_line(rate)
                self.contents.look()

            # Save, and draw images. Only after a step that was applied: to save weights that fail
            # right now would delete good checkpoints. What was due at a skipped step is still due.
            if report.applied:
                previous = writer.last_applied
                writer.note_applied(step)
                with self.records.paused():
                    if is_last or writer.is_due(step):
                        self._save()
                    if self.monitor.is_due(step, since=previous):
                        self._look(since=previous)
            elif is_last or step - writer.last_applied >= self.train.max_skipped_steps:
                self.records.rewind(self.rollbacks.roll_back())
            writer.poll()

            # Stop on a signal.
            if engine.step_count % _STOP_CHECK_STEPS == 0 and ranks.any_rank(bool(self.stop)):
                break

        if engine.step_count < total:
            self._stop_early()
        writer.wait()
        self.contents.look()
        return engine.step_count >= total

    def _write_line(self, rate: float) -> None:
        self.claim.check()
        not_finite = self.records.write_line(self.engine, learning_rate=rate)
        if not_finite:
            # The last good checkpoint may still be in progress.
            self.writer.wait()
            raise diverged_record(not_finite, self.engine.step_count)

    def _save(self) -> None:
        engine = self.engine
        # In a folder of that name made anew, a checkpoint would lack the run it belongs to.
        self.claim.check()
        self.writer.save(step=engine.step_count, pieces=engine.pieces(), state=engine.state())

    def _look(self, *, since: int) -> None:
        step = self.engine.step_count
        self.records.write_look(step, *self.monitor.look(self.engine, step, since=since))

    def _data_failed(self) -> bool:
        """Returns whether a rank could not read its batch because the run is told to stop.

        Otherwise raises, on all ranks, the DataError of a rank that could not; saves before that.
        """
        if not ranks.any_rank(self.feed.has_failed):
            return False
        self.engine.untake_step()
        if ranks.any_rank(bool(self.stop)):
            # The signal may have ended its data workers too.
            return True
        if self.writer.last_applied > self.writer.last_saved:
            self._save()
        self.writer.wait()
        ranks.together(self.feed.raise_failure)
        return False

    def _stop_early(self) -> None:
        """Saves, unless every step since the last checkpoint was skipped and changed nothing."""
        step, writer = self.engine.step_count, self.writer
        skipped = step - writer.last_applied
        if writer.last_applied > writer.last_saved:
            self._save()
        writer.wait()
        suffix = f" ({skipped} skipped before it)" if skipped else ""
        log.info("stopped by a signal at step %d%s; run the same command to continue", step, suffix)
