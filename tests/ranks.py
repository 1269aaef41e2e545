"""Runs a script of `tests/workers` as real ranks: separate processes, gloo, real DeepSpeed."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from places import ROOT, WORKERS

from srepa_ds.distributed.launcher import free_port

SECONDS = 240


class Rank(subprocess.Popen[str]):
    """A process whose output is read from its start.

    A pipe holds 64 KiB. If ranks were read one after the other, one that fills its pipe would stop
    in the middle of a warning, and the others would wait for it in a collective.
    """

    def __init__(self, command: list[str], environment: dict[str, str], cwd: Path | None):
        super().__init__(
            command,
            env=environment,
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with self.stdout as pipe:
            self._said = pipe.read()

    def output(self, *, seconds: float = SECONDS) -> str:
        """Returns all the process has printed once it has ended; raises TimeoutExpired."""
        self.wait(seconds)
        self._reader.join(seconds)
        return self._said


def start_ranks(command: list[str], world_size: int, *, cwd: Path | None = None) -> list[Rank]:
    """Starts `python COMMAND` as `world_size` ranks."""
    port = str(free_port())
    common = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    return [
        Rank(
            [sys.executable, *command], {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd
        )
        for rank in range(world_size)
    ]


def end(ranks: Iterable[Rank]) -> None:
    """Kills the ranks that still run."""
    for process in ranks:
        if process.poll() is None:
            process.kill()
            process.wait()


def run_worker(name: str, world_size: int, *arguments: str | Path) -> list[str]:
    """Runs `tests/workers/NAME.py ARGUMENTS` on all ranks and returns what each printed.

    A failing rank's output is the error.
    """
    ranks = start_ranks([str(WORKERS / f"{name}.py"), *map(str, arguments)], world_size)
    try:
        deadline = time.monotonic() + SECONDS
        for process in ranks:
            process.wait(max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass  # A killed rank fails below, with what it had printed.
    finally:
        end(ranks)
    outputs = [process.output() for process in ranks]
    failed = [i for i, process in enumerate(ranks) if process.returncode != 0]
    assert not failed, f"ranks {failed} failed:\n" + "\n".join(outputs[i] for i in failed)
    return outputs


def wait_for(path: Path, ranks: list[Rank]) -> None:
    """Waits until the ranks have written something into `path`."""
    deadline = time.monotonic() + 120
    # A record that is opened but empty says nothing of the other ranks.
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline, f"{path} never came"
        assert all(process.poll() is None for process in ranks), ranks[0].output()
        time.sleep(0.01)
