"""The record of a run: metrics.jsonl, TensorBoard's view of it, and a line of progress."""

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from srepa_ds.files import despite_full_disk, write_aside
from srepa_ds.run_folder import RunFolder
from srepa_ds.telemetry.tensorboard_file import TensorBoardFile

log = logging.getLogger("srepa_ds")


class Telemetry:
    """Writes the record of one run; on all ranks but the main one it does nothing."""

    def __init__(self, folder: Path, *, first_step: int, total_steps: int, is_main: bool):
        self._is_main = is_main
        self._run = run = RunFolder(folder)
        self._total_steps = total_steps
        self._progress: Progress | None = None
        if not is_main:
            return
        _forget_after(run, first_step)
        self._file = run.metrics.open("a", encoding="utf-8")
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
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
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
            self._file.close()
            _forget_after(self._run, step)
        self._file = self._run.metrics.open("a", encoding="utf-8")
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
        """Stops the progress and closes the files."""
        if self._is_main:
            if self._progress is not None:
                self._progress.stop()
            for opened, path in (
                (self._file, self._run.metrics),
                (self._board, self._run.tensorboard),
            ):
                with despite_full_disk(path.name):
                    opened.close()


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
    _keep_lines_until(run.metrics, step)
    for picture in run.pictures.glob("step-*.png"):
        number = picture.stem.removeprefix("step-")
        if number.isascii() and number.isdecimal() and int(number) > step:
            picture.unlink()


def _keep_lines_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            # The last line of a killed run may be torn.
            continue
    write_aside(path, lambda aside: aside.write_text("".join(kept), encoding="utf-8"))
