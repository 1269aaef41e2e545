"""Stop signals: the first asks a run to stop at the next good moment, a second ends it at once."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that ask a run to stop: from Ctrl-C, a scheduler, a closed terminal."""

SAME_REQUEST_SECONDS = 1.0
"""Signals closer together are one request: a scheduler that signals every process of a job reaches
a rank twice, directly and through its launcher."""

_NO_SIGNAL = b"\0"


@contextmanager
def handled(handler: Callable[[int], object]) -> Iterator[None]:
    """Calls `handler` with each stop signal that arrives while the block runs.

    A signal that this process was started to ignore stays ignored (`nohup`, a shell's background
    jobs). Outside the main thread, which alone may handle signals, nothing changes.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        heeded = [n for n in STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        previous = {n: signal.signal(n, lambda number, _: handler(number)) for n in heeded}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class Requests:
    """Counts stop signals, so that several of one request count once."""

    def __init__(self) -> None:
        self._first_came: float | None = None

    def is_second(self) -> bool:
        """Notes a signal that has just arrived; returns whether it repeats an earlier request."""
        now = time.monotonic()
        if self._first_came is None:
            self._first_came = now
        return now - self._first_came > SAME_REQUEST_SECONDS


@contextmanager
def stop_requested() -> Iterator[list[int]]:
    """Yields a list that holds the signal once one of `STOP_SIGNALS` has arrived.

    A second request, `SAME_REQUEST_SECONDS` later or more, ends the process at once, also while
    the main thread waits in a collective or for a disk.
    """
    received: list[int] = []
    with _ended_by_second(), handled(received.append):
        yield received


@contextmanager
def _ended_by_second() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Python runs a signal's handler only between two of its own instructions, so never while the
    # main thread waits in C. The number of a signal reaches this pipe even then.
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(read_end,), daemon=True, name="stop signals")
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        # Not by closing: forked data workers have copies of this end.
        os.write(write_end, _NO_SIGNAL)
        watcher.join()
        os.close(write_end)
        os.close(read_end)


def _watch(read_end: int) -> None:
    requests = Requests()
    while (number := os.read(read_end, 1)) != _NO_SIGNAL:
        if number[0] in STOP_SIGNALS and requests.is_second():
            os._exit(128 + number[0])


def leave_signals_to_parent() -> None:
    """Makes a forked process ignore Ctrl-C, which its parent handles, and end on other signals."""
    # Signals of this process would count as its parent's, which reads the same pipe.
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def leave_on_interrupt() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt, but end the process at once while modules load.

    An exception in the middle of an import would appear as a traceback of the module it met, or
    abort the process. A process that ignores Ctrl-C goes on ignoring it.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(_number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            if os.environ.get("RANK", "0") == "0" and sys.stderr is not None:
                print("interrupted", file=sys.stderr, flush=True)
            os._exit(128 + signal.SIGINT)
        frame = frame.f_back
    raise KeyboardInterrupt
