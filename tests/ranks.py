"""Runs a script of `tests/workers` as real ranks: separate processes, gloo, real DeepSpeed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from srepa_ds.launcher import free_port

WORKERS = Path(__file__).parent / "workers"
SECONDS = 240


def start_ranks(
    command: list[str], world_size: int, *, cwd: Path | None = None
) -> list[subprocess.Popen[str]]:
    """Starts `python COMMAND` as `world_size` ranks."""
    port = str(free_port())
    common = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(world_size)
    ]


def run_worker(name: str, world_size: int, *arguments: str | Path) -> None:
    """Runs `tests/workers/NAME.py ARGUMENTS` on all ranks; a failing rank's output is the error."""
    command = [str(WORKERS / f"{name}.py"), *map(str, arguments)]
    ranks = start_ranks(command, world_size)
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in ranks]
    finally:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
    failed = [i for i, process in enumerate(ranks) if process.returncode != 0]
    assert not failed, f"ranks {failed} failed:\n" + "\n".join(outputs[i] for i in failed)
