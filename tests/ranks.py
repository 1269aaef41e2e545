"""Runs functions and scripts on real ranks: separate processes, gloo, real DeepSpeed."""

import inspect
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from places import ROOT, WORKERS

from srepa_ds.distributed.launcher import environment_of, listening_socket

SECONDS = 240


class RankProcess(subprocess.Popen[str]):
    """The process of one rank, whose output is read from its start.

    A pipe holds 64 KiB. If ranks were read one after the other, a rank that fills its pipe would
    stop in the middle of a warning, and the others would wait for it in a collective.
    """

    def __init__(
        self, command: list[str], environment: dict[str, str], cwd: Path | None, handed: list[int]
    ):
        super().__init__(
            command,
            env=environment,
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=handed,
        )
        self._said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with self.stdout as pipe:
            self._said = pipe.read()

    def output(self, *, seconds: float = SECONDS) -> str:
        """Waits for the process and returns all it has printed; raises TimeoutExpired."""
        self.wait(seconds)
        self._reader.join(seconds)
        return self._said


def start_ranks(
    command: list[str], world_size: int, *, cwd: Path | None = None
) -> list[RankProcess]:
    """Starts `python COMMAND` as `world_size` ranks."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    started = []
    with listening_socket() as listening:
        for rank in range(world_size):
            environment = environment_of(rank, world_size, listening) | own
            # A script's own folder.
            environment.pop("PYTHONSAFEPATH", None)
            handed = [listening.fileno()] if rank == 0 else []
            started.append(RankProcess([sys.executable, *command], environment, cwd, handed))
    return started


def start_function(
    function: Callable[..., Any], world_size: int, *arguments: Any, results: Path
) -> list[RankProcess]:
    """Starts `function(*arguments)` on `world_size` ranks, each a fresh interpreter.

    The function stands at the top level of its file, which each rank imports. Arguments travel as
    JSON: a path arrives as a string, a tuple as a list. What a rank returns is written to
    RESULTS/RANK.json.
    """
    name, file = function.__qualname__, inspect.getsourcefile(function)
    if not name.isidentifier():
        raise ValueError(f"ranks cannot import {name}; move it to the top level of its file")
    given = json.dumps(arguments, default=str)
    return start_ranks(
        [str(WORKERS / "call_function.py"), str(file), name, given, str(results)], world_size
    )


def end(ranks: Iterable[RankProcess]) -> None:
    """Kills the ranks that still run."""
    for process in ranks:
        if process.poll() is None:
            process.kill()
            process.wait()


def outputs_of(ranks: list[RankProcess]) -> list[str]:
    """Waits for all ranks and returns what each printed; a failing rank's output is the error."""
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


def run_function(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Returns what `function(*arguments)` returns on each of `world_size` ranks.

    For arguments and results, which travel as JSON, see `start_function`. A failing rank's output
    is the error.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        outputs_of(start_function(function, world_size, *arguments, results=folder))
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


def run_worker(name: str, world_size: int, *arguments: str | Path) -> list[str]:
    """Runs `tests/workers/NAME.py ARGUMENTS` on all ranks and returns what each printed.

    A failing rank's output is the error.
    """
    return outputs_of(start_ranks([str(WORKERS / f"{name}.py"), *map(str, arguments)], world_size))


def wait_for(path: Path, ranks: list[RankProcess]) -> None:
    """Waits until the ranks have written something to `path`."""
    deadline = time.monotonic() + 120
    # A record that is opened but still empty does not show that the other ranks have started.
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline, f"{path} was never written"
        assert all(process.poll() is None for process in ranks), ranks[0].output()
        time.sleep(0.01)
