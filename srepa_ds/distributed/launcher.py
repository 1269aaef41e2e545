"""Ranks on this machine: starts them, passes signals on, and ends them together."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import srepa_ds
from srepa_ds.distributed.signals import Requests, handled
from srepa_ds.distributed.surroundings import STORE_DESCRIPTOR
from srepa_ds.errors import TopologyError

_POLL_SECONDS = 0.1
_SECONDS_TO_DIE = 3.0
_PR_SET_PDEATHSIG = 1
# More ranks than this on one machine may have to try again to reach rank 0.
_WAITING_CONNECTIONS = 1024
# Otherwise `python -m` imports Python files that lie in the working directory; which is right only
# where this package itself is imported from there.
_SAFE_PATH = {} if Path(srepa_ds.__file__).parents[1] == Path.cwd() else {"PYTHONSAFEPATH": "1"}
_CAUSES = {
    signal.SIGKILL: "by hand, by a scheduler, or by the system because memory ran out",
    signal.SIGBUS: "a file that it had mapped became shorter, or shared memory (/dev/shm) is full",
}


def check_number(num_ranks: int) -> None:
    """Raises TopologyError for fewer than one rank."""
    if num_ranks < 1:
        raise TopologyError(f"--ranks must be at least 1, got {num_ranks}")


def run_ranks(
    arguments: Sequence[str],
    num_ranks: int,
    *,
    leave_seconds: float = 3.0,
    kill_seconds: float = 60.0,
) -> int:
    """Runs `srepa-ds ARGUMENTS` as `num_ranks` local processes and returns the exit code.

    A stop signal reaches every rank once, so that all can save; a second one ends all at once.
    When a rank has failed, the others are asked to stop after `leave_seconds` and killed after
    `kill_seconds`. The code is that of the first rank that failed, else 0. Raises TopologyError for
    fewer than one rank.
    """
    check_number(num_ranks)
    ranks = _Ranks(leave_seconds, kill_seconds)
    try:
        with handled(ranks.receive):
            ranks.start(arguments, num_ranks)
            return ranks.wait()
    finally:
        ranks.end()


def start_child(
    command: Sequence[str], environment: dict[str, str], *, descriptors: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Starts a process that gets stop signals only from this one, and returns it.

    It has its own session, so that a terminal's Ctrl-C does not reach it twice. On Linux it dies
    with this process, so that it is never left behind. `descriptors` stay open in it.
    """
    return subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        preexec_fn=die_with_parent,
        pass_fds=descriptors,
    )


def die_with_parent() -> None:
    """Makes the system kill this process when its parent dies; only Linux can do that.

    SIGKILL, because a rank that is stopped or waits in a collective heeds nothing else.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        # It died before that.
        os._exit(128 + signal.SIGKILL)


def listening_socket() -> socket.socket:
    """Returns a socket that listens on a free port of the loopback interface.

    Rank 0 inherits it. A port that is only looked up may be taken before rank 0 opens it.
    """
    return socket.create_server(("127.0.0.1", 0), backlog=_WAITING_CONNECTIONS)


def environment_of(rank: int, num_ranks: int, listening: socket.socket) -> dict[str, str]:
    """Returns the environment that tells a rank its place, for ranks that meet at `listening`."""
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
        "MASTER_PORT": str(listening.getsockname()[1]),
        STORE_DESCRIPTOR: str(listening.fileno()),
        **_SAFE_PATH,
    }


class _Ranks:
    """The processes of a run, from their start to their end."""

    def __init__(self, leave_seconds: float, kill_seconds: float):
        self._leave_seconds = leave_seconds
        self._kill_seconds = kill_seconds
        self._processes: list[subprocess.Popen[bytes]] = []
        self._requests = Requests()
        self._ended_by: int | None = None
        self._killed_at = float("inf")

    def start(self, arguments: Sequence[str], num_ranks: int) -> None:
        command = [sys.executable, "-m", "srepa_ds", *arguments]
        with listening_socket() as listening:
            for rank in range(num_ranks):
                environment = environment_of(rank, num_ranks, listening)
                handed = [listening.fileno()] if rank == 0 else []
                self._processes.append(start_child(command, environment, descriptors=handed))

    def receive(self, number: int) -> None:
        """Passes a first stop signal on to all ranks, and kills them on a second one."""
        if self._requests.is_second():
            self._ended_by = number
            self._kill()
            return
        for process in self._alive():
            process.send_signal(number)
        # Not print: the signal may have interrupted one.
        with suppress(OSError):
            os.write(2, b"stopping; a second signal ends the ranks at once\n")

    def wait(self) -> int:
        """Waits for all ranks and returns the code of the first that failed, else 0.

        After a failure the others have time to report and leave by themselves.
        """
        first: int | None = None
        failed_at, asked, named = 0.0, False, False
        while (alive := self._alive()) and not self._is_past_killing():
            time.sleep(_POLL_SECONDS)
            if first is None and (first := self._failed()) is not None:
                failed_at = time.monotonic()
            if first is None:
                continue
            waited = time.monotonic() - failed_at
            is_killed = self._processes[first].returncode < 0
            if not named and (is_killed or waited > self._leave_seconds):
                named = True
                self._name(first)
            if waited > self._kill_seconds:
                self._kill()
            elif waited > self._leave_seconds and not asked:
                asked = True
                for process in alive:
                    process.terminate()
        first = self._failed() if first is None else first
        if self._ended_by is not None:
            return 128 + self._ended_by
        if first is None:
            return 0
        code = self._processes[first].returncode
        if code < 0 and not named:
            self._name(first)
        return 128 - code if code < 0 else code

    def end(self) -> None:
        """Kills the ranks that are left, with their own processes."""
        self._kill()
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_TO_DIE)
        for process in self._alive():
            with suppress(OSError):
                os.write(2, f"process {process.pid} waits for a disk and cannot end\n".encode())

    def _is_past_killing(self) -> bool:
        """Returns whether ranks were killed long ago: those left wait for a disk, in the system."""
        return time.monotonic() - self._killed_at > _SECONDS_TO_DIE

    def _alive(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self._processes if process.poll() is None]

    def _failed(self) -> int | None:
        """Returns the rank that failed; of several, one that was killed: it took others along."""
        codes = [process.poll() for process in self._processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        killed = [rank for rank in failed if (codes[rank] or 0) < 0]
        return next(iter([*killed, *failed]), None)

    def _kill(self) -> None:
        if self._alive():
            self._killed_at = min(self._killed_at, time.monotonic())
        for process in self._alive():
            # The session's number is that of its first process. Data workers belong to it too.
            os.killpg(process.pid, signal.SIGKILL)

    def _name(self, rank: int) -> None:
        code = self._processes[rank].returncode
        if self._ended_by is None:
            others = "; ending the other ranks" if self._alive() else ""
            # Whoever read the messages may have gone.
            with suppress(OSError):
                os.write(2, f"rank {rank} {_end_of(code)}{others}\n".encode())


def _end_of(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    number = signal.Signals(-code)
    cause = f" ({_CAUSES[number]})" if number in _CAUSES else ""
    return f"was ended by {number.name}{cause}"
