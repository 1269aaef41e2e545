"""The record of a run: metrics.jsonl, TensorBoard's view of it, and a line of progress."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from srepa_ds.files import despite_full_disk, write_aside, writing
from srepa_ds.run_folder import RunFolder
from srepa_ds.telemetry.json_lines import append_line, is_count, keep_lines, read_lines
from srepa_ds.telemetry.tensorboard_file import TensorBoardFile

log = logging.getLogger("srepa_ds")


class Telemetry:
    """Writes the record of one run; on all ranks but the main one it does nothing."""

    def __init__(self, folder: Path, *, first_step: int, total_steps: int, is_main: bool):
        """Drops what is recorded after `first_step`, and sets damaged lines aside.

        Raises OutputError if the record cannot be written to.
        """
        self._is_main = is_main
        self._run = run = RunFolder(folder)
        self._total_steps = total_steps
        self._progress: Progress | None = None
        if not is_main:
            return
        with writing(run.metrics, cure="move it away or fix its permissions"):
            # It may have been moved away, and a folder of that name cannot be opened.
            run.metrics.open("ab").close()
            _forget_after(run, first_step)
        self._board = TensorBoardFile(run.tensorboard, first_step=first_step)
        if sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._progress.add_task(
                "", total=total_steps, completed=first_step, text=""
            )
            self._progress.start()

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line of the record and shows the progress."""
        if not self._is_main:
            return
        with despite_full_disk(self._run.metrics.name):
            append_line(self._run.metrics, {"step": step, **values})
        with despite_full_disk(self._run.tensorboard.name):
            self._board.scalars(step, {f"train/{name}": v for name, v in values.items()})
        if self._progress is not None:
            self._progress.update(self._task, completed=step, text=_short_line(values))
        else:
            log.info("step %d/%d  %s", step, self._total_steps, _line(values))

    def rewind(self, step: int) -> None:
        """Drops lines and pictures after `step`, whose steps are about to be taken again."""
        if not self._is_main:
            return
        with despite_full_disk(self._run.metrics.name):
            _forget_after(self._run, step)
        with despite_full_disk(self._run.tensorboard.name):
            self._board.close()
            self._board = TensorBoardFile(self._run.tensorboard, first_step=step)

    def picture(self, step: int, image: Image.Image) -> None:
        """Writes a picture drawn at `step` to the run's folder and to TensorBoard."""
        if not self._is_main:
            return
        path = self._run.pictures / f"step-{step:07d}.png"
        with despite_full_disk(path.parent.name):
            path.parent.mkdir(exist_ok=True)
            write_aside(path, lambda aside: image.save(aside, format="PNG"))
        with despite_full_disk(self._run.tensorboard.name):
            self._board.image(step, "samples", image)

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the progress and closes the file of TensorBoard."""
        if self._is_main:
            if self._progress is not None:
                self._progress.stop()
            with despite_full_disk(self._run.tensorboard.name):
                self._board.close()


def _line(values: Mapping[str, float]) -> str:
    """Returns a line of the record as a log shows it: without zeros and minor values."""
    shown = [f"{name} {value:.4g}" for name, value in values.items() if _is_shown(name) and value]
    return "  ".join(shown)


def _is_shown(name: str) -> bool:
    return not name.startswith(("flow_t", "tflops", "peak_", "data_", "step_", "alignment_"))


def _short_line(values: Mapping[str, float]) -> str:
    """Returns the values that fit beside a bar on a terminal of 80 columns."""
    names = {"loss_total": "loss", "loss_flow": "flow", "images_per_second": "img/s"}
    shown = [f"{short} {values[name]:.3g}" for name, short in names.items() if name in values]
    return "  ".join(shown)


def _forget_after(run: RunFolder, step: int) -> None:
    """Drops lines and pictures after `step`, whose steps are about to be taken again."""
    lines = read_lines(run.metrics, is_metrics)
    keep_lines(lines, [line for line in lines.good if line.value["step"] <= step])
    with despite_full_disk(run.pictures.name):
        for picture in run.pictures.glob("step-*.png"):
            number = picture.stem.removeprefix("step-")
            # A superscript is a digit too, but no number.
            if number.isdecimal() and int(number) > step and not picture.is_dir():
                picture.unlink()


def is_metrics(line: Mapping[str, Any]) -> bool:
    """Returns whether an object is a line of the record."""
    return is_count(line.get("step"))
