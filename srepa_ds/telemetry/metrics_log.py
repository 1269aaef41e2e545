"""A run's record: metrics.jsonl, TensorBoard as a view of it, and a line of progress."""

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from srepa_ds.files import despite_full_disk, write_aside
from srepa_ds.telemetry.tensorboard_file import TensorBoardFile

log = logging.getLogger("srepa_ds")


RECORD = "metrics.jsonl"


PICTURES = "pictures"


class Telemetry:
    """Writes the record of one run; on all ranks but the main one it does nothing."""

    def __init__(self, folder: Path, *, first_step: int, total_steps: int, is_main: bool):
        self._is_main = is_main
        self._folder = folder
        self._total_steps = total_steps
        self._progress: Progress | None = None
        if not is_main:
            return
        _forget_after(folder, first_step)
        self._file = (folder / RECORD).open("a", encoding="utf-8")
        self._board = TensorBoardFile(folder / "tensorboard", first_step=first_step)
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
        with despite_full_disk(RECORD):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        with despite_full_disk("tensorboard"):
            self._board.scalars(step, {f"train/{name}": v for name, v in values.items()})
        if self._progress is not None:
            self._progress.update(self._task, completed=step, text=_short_line(values))
        else:
            log.info("step %d/%d  %s", step, self._total_steps, _line(values))

    def rewind(self, step: int) -> None:
        """Drops record and pictures after `step`: of steps that are about to be taken again."""
        if not self._is_main:
            return
        with despite_full_disk(RECORD):
            self._file.close()
            _forget_after(self._folder, step)
        self._file = (self._folder / RECORD).open("a", encoding="utf-8")
        with despite_full_disk("tensorboard"):
            self._board.close()
            self._board = TensorBoardFile(self._folder / "tensorboard", first_step=step)

    def picture(self, step: int, image: Image.Image) -> None:
        """Keeps a picture drawn at `step`: as a file of the run's folder, and in TensorBoard."""
        if not self._is_main:
            return
        path = self._folder / PICTURES / f"step-{step:07d}.png"
        with despite_full_disk(PICTURES):
            path.parent.mkdir(exist_ok=True)
            write_aside(path, lambda aside: image.save(aside, format="PNG"))
        with despite_full_disk("tensorboard"):
            self._board.image(step, "samples", image)

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Flushes and closes what is open."""
        if self._is_main:
            if self._progress is not None:
                self._progress.stop()
            for opened, name in ((self._file, RECORD), (self._board, "tensorboard")):
                with despite_full_disk(name):
                    opened.close()


def _line(values: Mapping[str, float]) -> str:
    """Returns what a log shows of a line of the record: what is there and not nought."""
    shown = [f"{name} {value:.4g}" for name, value in values.items() if _is_shown(name) and value]
    return "  ".join(shown)


def _is_shown(name: str) -> bool:
    return not name.startswith(("flow_t", "tflops", "peak_", "data_", "step_", "alignment_"))


def _short_line(values: Mapping[str, float]) -> str:
    """Returns what fits beside a bar on a terminal of 80 columns."""
    names = {"loss_total": "loss", "loss_flow": "flow", "images_per_second": "img/s"}
    shown = [f"{short} {values[name]:.3g}" for name, short in names.items() if name in values]
    return "  ".join(shown)


def _forget_after(folder: Path, step: int) -> None:
    """Drops lines and pictures after `step`: steps that the run is about to take again."""
    _keep_lines_until(folder / RECORD, step)
    for picture in (folder / PICTURES).glob("step-*.png"):
        number = picture.stem.removeprefix("step-")
        if number.isdigit() and int(number) > step:
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
