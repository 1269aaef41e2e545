"""A run's record: metrics.jsonl, TensorBoard as a view of it, and a line of progress.

Losses stay on the device between log points; one transfer per window reads them all.
"""

import importlib.metadata
import json
import logging
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track
from torch import Tensor

from srepa_ds import __version__, distributed
from srepa_ds.files import write_aside
from srepa_ds.tensorboard_file import TensorBoardFile

log = logging.getLogger("srepa_ds")
T = TypeVar("T")
RECORD = "metrics.jsonl"
PICTURES = "pictures"
_PACKAGES = ("torch", "deepspeed", "timm", "numpy", "safetensors", "torchdata")


def set_up_logging(*, is_main: bool) -> None:
    """Sends the package's messages of the main rank to the terminal, of others only warnings."""
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(
            console=Console(stderr=True), show_path=False, rich_tracebacks=False
        )
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if is_main else logging.WARNING)


def environment() -> dict[str, Any]:
    """Returns the versions and the machine a result came from."""
    return {
        "srepa_ds": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "world_size": distributed.world_size(),
        "command": sys.argv,
    }


@dataclass(frozen=True)
class WindowMeans:
    """What a window of steps was like, on the host."""

    tensors: Mapping[str, Tensor]
    """Means over the applied steps; none if all were skipped."""

    skipped: int
    """Steps that were not applied."""

    step_seconds: float
    data_wait_share: float
    """Share of the time in which this rank waited for its data."""

    def scalars(self) -> dict[str, float]:
        """Returns the means that are single numbers."""
        return {name: value.item() for name, value in self.tensors.items() if value.ndim == 0}


class Window:
    """Means of device tensors over the steps since the last log point, without a host sync."""

    def __init__(self) -> None:
        self._shapes: dict[str, torch.Size] = {}
        self._begin()

    def _begin(self) -> None:
        self._sums: Tensor | None = None
        self._applied = 0
        self._skipped = 0
        self._waited = 0.0
        self._began = time.perf_counter()

    def add(self, values: Mapping[str, Tensor], *, applied: bool = True) -> None:
        """Adds one step's tensors; every step gives the same names and shapes.

        Those that were not applied are only counted.
        """
        if not applied:
            self._skipped += 1
            return
        flat = torch.cat([value.detach().float().reshape(-1) for value in values.values()])
        self._shapes = {name: value.shape for name, value in values.items()}
        self._sums = flat if self._sums is None else self._sums + flat
        self._applied += 1

    def waited(self, seconds: float) -> None:
        """Counts time in which a step had to wait for its data."""
        self._waited += seconds

    def close(self) -> "WindowMeans":
        """Returns the means over the window and all ranks, and begins a new window.

        Collective, and the one host sync of the window.
        """
        means = self._means()
        seconds = time.perf_counter() - self._began
        result = WindowMeans(
            means,
            skipped=self._skipped,
            step_seconds=seconds / (self._applied + self._skipped),
            data_wait_share=min(1.0, self._waited / seconds),
        )
        self._begin()
        return result

    def _means(self) -> dict[str, Tensor]:
        if self._sums is None:
            return {}
        means = distributed.averaged(self._sums / self._applied).cpu()
        parts = means.split([shape.numel() for shape in self._shapes.values()])
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the block out of `step_seconds`."""
        paused_at = time.perf_counter()
        yield
        self._began += time.perf_counter() - paused_at


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


@contextmanager
def despite_full_disk(name: str) -> Iterator[None]:
    """Makes a warning of an OSError met in the block.

    A run is worth more than what it says of itself; its next checkpoint says more clearly what is
    wrong with the disk.
    """
    try:
        yield
    except OSError as error:
        log.warning("cannot write %s: %s", name, error.strerror or error)


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


def steps_shown(steps: Iterable[T], *, total: int, what: str, is_main: bool) -> Iterator[T]:
    """Yields `steps` and shows how far they are: a bar on a terminal, some lines in a log."""
    if is_main and sys.stderr.isatty():
        yield from track(
            steps, description=what, total=total, console=Console(stderr=True), transient=True
        )
        return
    began = time.perf_counter()
    for number, step in enumerate(steps, start=1):
        yield step
        if number == total or number % max(1, total // 10) == 0:
            log.info("%s %d/%d  %.0f s", what, number, total, time.perf_counter() - began)
