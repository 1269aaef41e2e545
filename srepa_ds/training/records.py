"""Gathers the measurements of training steps and writes them to the record, window by window."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager

from PIL import Image

from srepa_ds.distributed.ranks import Rank
from srepa_ds.engine import Engine, StepReport
from srepa_ds.model.variants import SiTConfig
from srepa_ds.objective import TIME_BINS
from srepa_ds.telemetry.metrics_log import Telemetry
from srepa_ds.telemetry.throughput import peak_memory_gb, throughput
from srepa_ds.telemetry.window import Window, WindowMeans


class Records:
    """Sums up steps without waiting for the device, and writes a line of the record per window."""

    def __init__(
        self,
        telemetry: Telemetry,
        *,
        model: SiTConfig,
        batch_size: int,
        is_aligned: bool,
        rank: Rank,
    ):
        """With `is_aligned`, there is a point-wise term, whose cosine is recorded."""
        self._telemetry = telemetry
        self._model = model
        self._batch_size = batch_size
        self._is_aligned = is_aligned
        self._rank = rank
        self._window = Window()

    def add(self, report: StepReport, *, waited: float) -> None:
        """Adds a step to the window; it had to wait `waited` seconds for its data."""
        losses = report.losses._asdict()
        by_time = losses.pop("flow_by_time")
        device = by_time.device
        tensors = {f"loss_{name}": value for name, value in losses.items()}
        tensors |= {"gradient_norm": report.gradient_norm.to(device), "by_time": by_time}
        self._window.add(tensors, applied=report.applied)
        self._window.waited(waited)

    def paused(self) -> AbstractContextManager[None]:
        """Leaves the time of the block out of the speed."""
        return self._window.paused()

    def write_line(self, engine: Engine, *, learning_rate: float) -> list[str]:
        """Writes a line with the means of the window, and starts a new window.

        Returns the names of values that are not finite although no step was skipped. Collective,
        and waits for the device.
        """
        means = self._window.close()
        line = {
            **self._measured(means),
            "learning_rate": learning_rate,
            "ema_distance": engine.ema_distance().item(),
            "peak_memory_gb": peak_memory_gb(self._rank.device),
        }
        bad = [name for name, value in line.items() if not math.isfinite(value)]
        finite = {name: value for name, value in line.items() if name not in bad}
        self._telemetry.record(engine.step_count, finite)
        return bad if means.skipped == 0 else []

    def write_look(self, step: int, sheet: Image.Image | None, scores: Mapping[str, float]) -> None:
        """Writes the monitor's contact sheet and scores, if there are any."""
        if sheet is not None:
            self._telemetry.picture(step, sheet)
        if scores:
            self._telemetry.record(step, scores)

    def rewind(self, step: int) -> None:
        """Removes everything recorded after `step`, and starts a new window."""
        self._telemetry.rewind(step)
        self._window = Window()

    def _measured(self, means: WindowMeans) -> dict[str, float]:
        return {
            **self._means(means),
            "skipped": means.skipped,
            "step_seconds": means.step_seconds,
            "data_wait_share": means.data_wait_share,
            **throughput(
                self._model,
                images_per_second=self._batch_size / means.step_seconds,
                world_size=self._rank.world_size,
                device=self._rank.device,
            ),
        }

    def _means(self, means: WindowMeans) -> dict[str, float]:
        """Returns losses and norms; an empty dict if all steps of the window were skipped."""
        if not means.tensors:
            return {}
        scalars = means.scalars()
        sums, counts = means.tensors["by_time"]
        by_time = {
            f"flow_t{(number + 0.5) / TIME_BINS:.2f}": (sums[number] / counts[number]).item()
            for number in range(TIME_BINS)
            if counts[number] > 0
        }
        cosine = {"alignment_cosine": -scalars["loss_pointwise"]} if self._is_aligned else {}
        return {**scalars, **cosine, **by_time}
