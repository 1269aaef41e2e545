"""The loop of a training run: steps, the record, checkpoints, and what happens when it diverges."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.checkpoint.retention import return_point
from srepa_ds.checkpoint.writer import CheckpointWriter
from srepa_ds.config.experiment import Config
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.engine import Engine, StepReport
from srepa_ds.errors import DataError, DivergedError, met_by_all
from srepa_ds.objective import TIME_BINS
from srepa_ds.optim.adamw import learning_rate
from srepa_ds.schema import to_tree
from srepa_ds.telemetry.metrics_log import Telemetry
from srepa_ds.telemetry.throughput import peak_memory_gb, throughput
from srepa_ds.telemetry.window import Window, WindowMeans
from srepa_ds.training import rollbacks
from srepa_ds.training.feed import Feed
from srepa_ds.training.monitor import Monitor

log = logging.getLogger("srepa_ds")

# Asking all ranks costs a collective and, on a GPU, a wait for the device.
_STOP_CHECK_STEPS = 5


@dataclass
class TrainingLoop:
    """Everything a run is made of, and how far it has come."""

    config: Config
    rank: Rank
    engine: Engine
    feed: Feed
    telemetry: Telemetry
    monitor: Monitor
    writer: CheckpointWriter
    identity: dict[str, str | None]
    stop: list[int]
    """Signals received by this rank."""

    window: Window = field(default_factory=Window)
    saved_at: int = -1
    applied_at: int = -1
    """The last step that was not skipped."""

    def run(self) -> bool:
        """Returns whether the run came to its end; False if a signal stopped it.

        Raises DivergedError if it cannot go on with finite losses and gradients.
        """
        engine, total = self.engine, self.config.train.steps
        if engine.step_count >= total:
            log.info("already trained to step %d, nothing to do", engine.step_count)
        self._goes_on_from(engine.step_count)
        while engine.step_count < total:
            self._step()
            self.writer.poll()
            if engine.step_count % _STOP_CHECK_STEPS == 0:
                if ranks.any_rank(bool(self.stop)):
                    break
        if engine.step_count < total:
            self._stop()
        self.writer.wait()
        return engine.step_count >= total

    def _goes_on_from(self, step: int) -> None:
        self.window, self.saved_at, self.applied_at = Window(), step, step
        self.writer.goes_on_from(step)

    def _step(self) -> None:
        """Takes one step and does what is due after it."""
        engine, config = self.engine, self.config.train
        rate = learning_rate(self.config.optimizer, engine.step_count)
        report = engine.step(self.feed.step(), learning_rate=rate)
        self._count(report)
        step, last = engine.step_count, engine.step_count == config.steps
        if not report.applied:
            self._explain(report)
        if last or step % config.log_every_steps == 0:
            self._record(rate)
        if report.applied:
            self._applied(step, last=last)
        elif last or step - self.applied_at >= config.max_skipped_steps:
            self._roll_back()

    def _applied(self, step: int, *, last: bool) -> None:
        """Saves and looks, if that fell due with this step or with skipped ones before it.

        A state that fails right now is not saved: good checkpoints would be deleted for it.
        """
        before, self.applied_at = self.applied_at, step
        self.writer.applied(step)
        every = self.config.checkpoint.every_steps
        if last or step // every > self.saved_at // every:
            self._paused(self._save)
        if self.monitor.is_due(step, since=before):
            self._paused(lambda: self._look(since=before))

    def _stop(self) -> None:
        """Ends the run early, saved: skipped steps have changed nothing."""
        step, skipped = self.engine.step_count, self.engine.step_count - self.applied_at
        if self.applied_at > self.saved_at:
            self._save()
        self.writer.wait()
        so_far = f" ({skipped} skipped before it)" if skipped else ""
        log.info("stopped by a signal at step %d%s; run the same command to go on", step, so_far)

    def _paused(self, action: Callable[[], None]) -> None:
        with self.window.paused():
            action()

    def _count(self, report: StepReport) -> None:
        """Takes a step's losses into the record."""
        losses = report.losses._asdict()
        by_time = losses.pop("flow_by_time")
        device = by_time.device
        tensors = {f"loss_{name}": value for name, value in losses.items()}
        tensors |= {"gradient_norm": report.gradient_norm.to(device), "by_time": by_time}
        self.window.add(tensors, applied=report.applied)
        self.window.waited(self.feed.waited())

    def _explain(self, report: StepReport) -> None:
        """Says which term of a skipped step was not finite, and keeps its samples. Collective."""
        gathered = ranks.gather((self.feed.unusable(), self.feed.sample_ids()))
        _raise_for_teachers(self.config, [unusable for unusable, _ in gathered])
        step = self.engine.step_count
        values = ranks.averaged(torch.stack(_terms(report))).tolist()
        names = ("flow", "pointwise", "structural", "cls")
        culprits = [n for n, value in zip(names, values, strict=True) if not math.isfinite(value)]
        culprits = culprits or ["gradient"]
        sample_ids = [number for _, ids in gathered for number in ids]
        if self.rank.is_main:
            log.warning("step %d skipped: %s not finite", step, ", ".join(culprits))
            rollbacks.note_skipped(
                self.config.run.folder, step, not_finite=culprits, sample_ids=sample_ids
            )

    def _roll_back(self) -> None:
        """Returns to the last good checkpoint, and goes on behind the samples that failed."""
        engine, folder, failed_at = self.engine, self.config.run.folder, self.engine.step_count
        self.writer.wait()
        point = ranks.on_main(lambda: return_point(self.config.checkpoints))
        if point is None:
            raise self._diverged(f"and there {self._without_checkpoint()}")
        reader = ranks.together(lambda: CheckpointReader(point.folder))
        back_to, seen = reader.state["step"], engine.samples_seen
        before = ranks.on_main(lambda: rollbacks.setbacks_after(folder, back_to)).rollbacks
        allowed = self.config.train.max_rollbacks
        if before >= allowed:
            verdict = "is good" if point.is_good else "may be bad itself: no step from it was taken"
            raise self._diverged(f"after {before} rollbacks; {point.folder.name} {verdict}")
        ranks.on_main(
            lambda: rollbacks.note_rollback(folder, failed_at, to=back_to, samples_seen=seen)
        )
        engine.restore(reader)
        # The data goes on where it was: the same samples would only fail again.
        engine.samples_seen = seen
        self.feed.continue_at(back_to)
        self.telemetry.rewind(back_to)
        self._goes_on_from(back_to)
        if self.rank.is_main:
            how_often = f"{before + 1} of {allowed} times"
            log.warning("rolled back from step %d to %s (%s)", failed_at, point.folder, how_often)

    def _without_checkpoint(self) -> str:
        """Saves a run that only its very last steps keep from its end; returns what there is."""
        if self.engine.step_count - self.applied_at >= self.config.train.max_skipped_steps:
            return "is no checkpoint yet"
        self._save()
        self.writer.wait()
        return f"was no checkpoint to go back to; step {self.applied_at} is saved as the last"

    def _diverged(self, how_far: str) -> DivergedError:
        listed = self.config.run.folder / rollbacks.SKIPPED
        text = (
            f"steps {self.applied_at + 1} to {self.engine.step_count} were not finite, {how_far}; "
            f"the samples are listed in {listed}: look at them, or resume with a smaller "
            "optimizer.learning_rate or engine.precision=fp32"
        )
        return met_by_all(DivergedError(text))

    def _record(self, rate: float) -> None:
        means, step = self.window.close(), self.engine.step_count
        line = _line(means, self.config, self.rank) | {
            "learning_rate": rate,
            "ema_distance": self.engine.ema_distance().item(),
            "peak_memory_gb": peak_memory_gb(self.rank.device),
        }
        bad = [name for name, value in line.items() if not math.isfinite(value)]
        self.telemetry.record(step, {k: value for k, value in line.items() if k not in bad})
        if bad and means.skipped == 0:
            # The last good checkpoint may still be on its way.
            self.writer.wait()
            text = f"{', '.join(bad)} not finite up to step {step}; resume with a smaller "
            text += "optimizer.learning_rate or engine.precision=fp32"
            raise met_by_all(DivergedError(text))

    def _look(self, *, since: int) -> None:
        sheet, scores = self.monitor.look(self.engine, self.engine.step_count, since=since)
        if sheet is not None:
            self.telemetry.picture(self.engine.step_count, sheet)
        if scores:
            self.telemetry.record(self.engine.step_count, scores)

    def _save(self) -> None:
        extra: dict[str, Any] = {"identity": self.identity, "config": to_tree(self.config)}
        self.writer.save(
            step=self.engine.step_count,
            pieces=self.engine.pieces(),
            state={**self.engine.state(), **extra},
        )
        self.saved_at = self.engine.step_count


def _terms(report: StepReport) -> list[torch.Tensor]:
    losses = report.losses
    return [losses.flow, losses.pointwise, losses.structural, losses.cls]


def _raise_for_teachers(config: Config, by_rank: list[dict[int, list[int]]]) -> None:
    """Raises DataError, on all ranks, for samples that a teacher has no finite tokens for.

    A frozen teacher would fail on them again in every epoch.
    """
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
        raise met_by_all(DataError(text))


def _line(means: WindowMeans, config: Config, rank: Rank) -> dict[str, float]:
    """Returns what the record says of a window."""
    return {
        **_means(means, config),
        "skipped": means.skipped,
        "step_seconds": means.step_seconds,
        "data_wait_share": means.data_wait_share,
        **throughput(
            config.model,
            images_per_second=config.train.batch_size / means.step_seconds,
            world_size=rank.world_size,
            device=rank.device,
        ),
    }


def _means(means: WindowMeans, config: Config) -> dict[str, float]:
    """Returns the losses and norms of a window; nothing of one whose steps were all skipped."""
    if not means.tensors:
        return {}
    scalars = means.scalars()
    sums, counts = means.tensors["by_time"]
    by_time = {
        f"flow_t{(number + 0.5) / TIME_BINS:.2f}": (sums[number] / counts[number]).item()
        for number in range(TIME_BINS)
        if counts[number] > 0
    }
    cosine = {}
    if any(alignment.pointwise for alignment in config.alignments):
        cosine = {"alignment_cosine": -scalars["loss_pointwise"]}
    return {**scalars, **cosine, **by_time}
