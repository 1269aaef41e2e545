"""The terminal: log messages, progress, and other packages' warnings, each once per run.

Python's own rule for warnings, once per line of code, fails in a training: it starts over whenever
a package enters `warnings.catch_warnings`, and every rank applies it separately.
"""

import logging
import mmap
import os
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO, TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

log = logging.getLogger("srepa_ds")

T = TypeVar("T")

_PACKAGE = str(Path(__file__).parent) + os.sep
_SECONDS_BETWEEN_LINES = 300.0


class WarningsOnce:
    """Replaces `warnings.showwarning`.

    Once the ranks have joined, they agree which of them shows a warning. Before that, the main rank
    shows its own and the others keep theirs until they can ask. Warnings at this package's own
    lines are shown once on every rank.
    """

    def __init__(self) -> None:
        self._otherwise = warnings.showwarning
        self._known = _SharedSet()
        self._process = os.getpid()
        self._is_first: Callable[[str], bool] | None = None
        self._shown_alone: list[str] = []
        self._waiting: list[str] = []

    def show(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Shows a warning, unless this run has already shown the same text from the same line."""
        if file is not None:
            self._otherwise(message, category, filename, lineno, file, line)
            return
        where = f"{'/'.join(Path(filename).parts[-3:])}:{lineno}"
        text = f"{category.__name__}: {message} ({where}; shown once)"
        if self._known.add(text) and (filename.startswith(_PACKAGE) or self._may_show(text)):
            log.warning("%s", text)

    def agree_by(self, is_first: Callable[[str], bool] | None) -> None:
        """Decides by `is_first(text)`, True on one rank per text; None once the ranks part."""
        self._is_first = is_first
        if is_first is not None:
            # The main rank has already shown these, so the others must not.
            for text in self._shown_alone:
                self._ask(text)
        self._shown_alone = []

    def show_waiting(self) -> None:
        """Shows the warnings this rank has kept, except those that another rank has shown."""
        waiting, self._waiting = self._waiting, []
        for text in waiting:
            if self._ask(text):
                log.warning("%s", text)

    def _may_show(self, text: str) -> bool:
        # A forked data worker must not use its parent's connection to the other ranks.
        if os.getpid() != self._process or self._is_first is not None:
            return self._ask(text)
        if os.environ.get("RANK", "0") == "0":
            self._shown_alone.append(text)
            return True
        self._waiting.append(text)
        return False

    def _ask(self, text: str) -> bool:
        if self._is_first is None or os.getpid() != self._process:
            return True
        try:
            return self._is_first(text)
        except RuntimeError:
            return True  # The other ranks are gone; better twice than never.


class _SharedSet:
    """A set of texts shared with the processes forked from this one, such as data workers."""

    def __init__(self, size: int = 1 << 20) -> None:
        self._marks = mmap.mmap(-1, size)

    def add(self, text: str) -> bool:
        """Adds `text` and returns whether it is new.

        Two texts collide with a chance of one in a million.
        """
        mark = zlib.crc32(text.encode(errors="replace")) % len(self._marks)
        is_new = self._marks[mark] == 0
        self._marks[mark] = 1
        return is_new


_shown = WarningsOnce()


def show_warnings_once() -> None:
    """Shows the warnings of this process, and of those it forks, through `WarningsOnce`."""
    warnings.showwarning = _shown.show


def let_ranks_agree(is_first: Callable[[str], bool] | None) -> None:
    """Lets the ranks agree which of them shows a warning; see `WarningsOnce.agree_by`."""
    _shown.agree_by(is_first)


def show_waiting_warnings() -> None:
    """Shows the warnings that this rank has kept because it could not ask the others."""
    _shown.show_waiting()


def set_up_logging(*, is_main: bool) -> None:
    """Sends the package's log to the terminal: all of the main rank's, of others only warnings."""
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


class Progress:
    """Shows how far something has come: a bar on a terminal, lines in a log; a context manager.

    Both tell the rate and the time that is left. A log gets a line for each tenth, and at least
    every five minutes.
    """

    def __init__(self, what: str, *, total: int, is_main: bool):
        """Shows nothing unless `is_main`."""
        self._what = what
        self._total = total
        self._is_main = is_main
        self._bar = _bar() if is_main and sys.stderr.isatty() else None
        self._task = self._bar.add_task(what, total=total, rate="") if self._bar else None
        self._began = self._told_at = time.perf_counter()
        self._told_of = 0

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def at(self, done: int) -> None:
        """Shows that `done` of all steps are done."""
        now = time.perf_counter()
        rate = done / max(now - self._began, 1e-9)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, rate=f"{rate:,.1f}/s")
            return
        is_due = now - self._told_at >= _SECONDS_BETWEEN_LINES
        is_tenth = done * 10 // max(self._total, 1) > self._told_of * 10 // max(self._total, 1)
        if not self._is_main or not (is_tenth or is_due):
            return
        self._told_at, self._told_of = now, done
        left = (self._total - done) / rate if rate else 0.0
        ending = f", {duration(left)} left" if done < self._total else ""
        text = f"{self._what} {done:,}/{self._total:,}"
        log.info("%s  %s, %s/s%s", text, duration(now - self._began), f"{rate:,.1f}", ending)


def duration(seconds: float) -> str:
    """Returns a time for people: `45 s`, `12 min`, `3 h 5 min`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60:,} h {minutes % 60} min"


def _bar() -> RichProgress:
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def steps_shown(steps: Iterable[T], *, total: int, what: str, is_main: bool) -> Iterator[T]:
    """Yields `steps` and shows their progress; see `Progress`."""
    with Progress(what, total=total, is_main=is_main) as progress:
        for number, step in enumerate(steps, start=1):
            yield step
            progress.at(number)
