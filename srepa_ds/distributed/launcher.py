"""Ranks on this machine: starts them, passes signals on, and ends them together."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from srepa_ds.errors import TopologyError

_POLL_SECONDS = 0.1
_SAME_SIGNAL_SECONDS = 3.0
_PR_SET_PDEATHSIG = 1

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that ask a run to stop: from Ctrl-C, a scheduler, a closed terminal."""


def launched() -> bool:
    """Returns whether a launcher (torchrun, deepspeed, Slurm, ours) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def free_port() -> int:
    """Returns a TCP port that was free on the loopback interface a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(
    arguments: Sequence[str],
    num_ranks: int,
    *,
    port: int,
    leave_seconds: float = 3.0,
    kill_seconds: float = 60.0,
) -> int:
    """Runs `srepa-ds ARGUMENTS` as `num_ranks` local processes and returns the exit code.

    Stop signals reach every rank once, so that all can save. When a rank has failed, the others are
    asked to stop after `leave_seconds` and killed after `kill_seconds`. The code is that of the
    first rank that failed, else 0. Raises TopologyError for fewer than one rank.
    """
    if num_ranks < 1:
        raise TopologyError(f"--ranks must be at least 1, got {num_ranks}")
    command = [sys.executable, "-m", "srepa_ds", *arguments]
    ranks: list[subprocess.Popen[bytes]] = []
    previous = {
        number: signal.signal(number, _forwarding(ranks))
        for number in STOP_SIGNALS
        if threading.current_thread() is threading.main_thread()
    }
    try:
        for rank in range(num_ranks):
            environment = _environment(rank, num_ranks, port)
            ranks.append(start_child(command, environment))
        return _wait(ranks, leave_seconds, kill_seconds)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()


def start_child(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Starts a process that gets stop signals only from this one, and returns it.

    It has its own session, so that a terminal's Ctrl-C does not reach it twice. On Linux it is
    asked to stop when this process dies, so that it is never left behind.
    """
    return subprocess.Popen(
        command, env=environment, start_new_session=True, preexec_fn=_stop_with_parent
    )


def _stop_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    # The cores this process may use: a container's share, not the whole machine.
    threads = str(max(1, len(os.sched_getaffinity(0)) // num_ranks))
    return {
        "OMP_NUM_THREADS": threads,
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@contextmanager
def stop_requested() -> Iterator[list[int]]:
    """Yields a list that holds the signal once one of `STOP_SIGNALS` has arrived.

    The first signal asks for a stop at the next good moment. Another one some seconds later ends
    the process at once. A sooner one counts as the same request: a scheduler that signals every
    process reaches a rank twice, directly and through its launcher.
    """
    received: list[int] = []
    first_came: list[float] = []

    def note(number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if received and now - first_came[0] > _SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(number)
        first_came.append(now)

    previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _forwarding(
    ranks: Sequence[subprocess.Popen[bytes]],
) -> Callable[[int, FrameType | None], None]:
    def forward(number: int, _frame: FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    return forward


def _wait(
    ranks: Sequence[subprocess.Popen[bytes]], leave_seconds: float, kill_seconds: float
) -> int:
    """Waits for all ranks and returns the code of the first that failed, else 0.

    After a failure the others have time to report and leave by themselves.
    """
    first_failure, failed_at, asked = 0, 0.0, False
    while any(process.poll() is None for process in ranks):
        time.sleep(_POLL_SECONDS)
        failed = [process.poll() for process in ranks if process.poll()]
        if failed and not first_failure:
            first_failure, failed_at = failed[0] or 0, time.monotonic()
        waited = time.monotonic() - failed_at if first_failure else 0.0
        alive = [process for process in ranks if process.poll() is None]
        if waited > kill_seconds:
            for process in alive:
                process.kill()
        elif waited > leave_seconds and not asked:
            asked = True
            for process in alive:
                process.terminate()
    failure = first_failure or next((code for p in ranks if (code := p.wait())), 0)
    return 128 - failure if failure < 0 else failure
