"""Runs that something outside has broken: frozen ranks, killed ranks, killed launchers, workers."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

from srepa_ds.checkpoint.folder import steps_in
from srepa_ds.run_folder import RunFolder

pytestmark = pytest.mark.slow


class Training:
    """A training on two ranks, started as a user would, and looked at from outside."""

    def __init__(self, config: Path, folder: Path, *overrides: str, **variables: str):
        self.run = RunFolder(folder / "run")
        command = ["train", str(config), f"run.folder={self.run.path}", "train.steps=100000"]
        command += ["train.log_every_steps=2", "checkpoint.every_steps=100000", *overrides]
        self._log = (folder / "log").open("wb+")
        self.launcher = subprocess.Popen(
            [sys.executable, "-m", "srepa_ds", *command, "--ranks", "2"],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
            cwd=folder,
        )

    def said(self) -> str:
        self._log.seek(0)
        return self._log.read().decode()

    def wait_until(self, words: str, *, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.said():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)

    def ranks(self) -> list[int]:
        return sorted(children_of(self.launcher.pid))

    def processes(self) -> list[int]:
        """The launcher, its ranks and their data workers."""
        found, todo = [], [self.launcher.pid]
        while todo:
            found.append(todo.pop())
            todo += children_of(found[-1])
        return found

    def end(self) -> None:
        self._log.close()
        self.launcher.kill()
        self.launcher.wait()


def children_of(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children")
    return [int(number) for number in listed.read_text().split()] if listed.exists() else []


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def assert_gone(processes: list[int], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := [process for process in processes if is_alive(process)]:
        assert time.monotonic() < deadline, f"alive after {seconds} s: {left}"
        time.sleep(0.05)


@pytest.fixture
def training(small_world, tmp_path) -> Iterator[Training]:
    overrides = ["monitor.images_every_steps=0", "monitor.evaluate_every_steps=0"]
    overrides += ["data.num_workers=1"]
    started = Training(small_world.config, tmp_path, *overrides, SREPA_STUCK_SECONDS="5")
    try:
        started.wait_until("step 2/")
        yield started
    finally:
        started.end()


def assert_names_a_frozen(training: Training, rank: int) -> None:
    os.kill(training.ranks()[rank], signal.SIGSTOP)
    training.wait_until(f"rank {rank} (", seconds=60)
    assert "has given no sign of life" in training.said()
    assert "commands/train.py" in training.said()


def test_a_frozen_rank_is_named_and_a_second_signal_ends_the_run(training):
    everything = training.processes()
    assert_names_a_frozen(training, 1)
    training.launcher.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert training.launcher.poll() is None
    training.launcher.send_signal(signal.SIGTERM)
    assert training.launcher.wait(5) == 128 + signal.SIGTERM
    assert_gone(everything, seconds=5)


def test_ranks_die_with_their_launcher_even_frozen_ones(training):
    everything = training.processes()
    assert_names_a_frozen(training, 0)
    os.kill(training.launcher.pid, signal.SIGKILL)
    training.launcher.wait()
    assert_gone(everything, seconds=5)


def test_a_killed_rank_is_named_and_the_others_give_one_line(training):
    everything = training.processes()
    os.kill(training.ranks()[1], signal.SIGKILL)
    assert training.launcher.wait(60) == 128 + signal.SIGKILL
    said = training.said()
    assert "rank 1 was ended by SIGKILL" in said
    assert "Traceback" not in said
    lost = [line for line in said.splitlines() if "lost the connection to another rank" in line]
    assert len(lost) == 1, said
    assert_gone(everything, seconds=5)


def test_a_signal_to_every_process_of_the_job_saves_and_stops(training):
    for process in training.processes():
        os.kill(process, signal.SIGTERM)
    assert training.launcher.wait(60) == 75
    assert "error:" not in training.said()
    assert len(steps_in(training.run.checkpoints)) == 1


def test_a_worker_s_death_ends_all_ranks_after_saving(training):
    (worker,) = children_of(training.ranks()[1])
    os.kill(worker, signal.SIGKILL)
    assert training.launcher.wait(60) == 2
    said = training.said()
    assert said.count("error: a data worker has failed") == 1, said
    assert "Traceback" not in said
    assert len(steps_in(training.run.checkpoints)) == 1
