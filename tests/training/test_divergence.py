"""Runs that diverge, on the command line of two ranks: what they keep, log and roll back to."""

import re
import signal
import subprocess
from pathlib import Path

import pytest
from ranks import RankProcess, run_function, start_ranks, wait_for
from trainings import train_on_faulty_data, train_runs

from srepa_ds.checkpoint.folder import named

pytestmark = pytest.mark.slow

# A line of the record would tell at once.
RUIN = ("optimizer.learning_rate=1e30", "train.log_every_steps=100", "--allow-config-change")


def start(world, folder: Path, *overrides: str) -> list[RankProcess]:
    command = ["-m", "srepa_ds", "train", str(world.config), f"run.folder={folder}", *overrides]
    return start_ranks(command, 2)


def train(world, folder: Path, *overrides: str) -> tuple[list[int], str]:
    """Returns the exit codes of the ranks, and their output."""
    ranks = start(world, folder, *overrides)
    said = [process.output(seconds=200) for process in ranks]
    return [process.returncode for process in ranks], "".join(said)


def steps(folder: Path, prefix: str = "") -> list[int]:
    return [int(path.name[-7:]) for path in sorted(named(folder / "checkpoints", prefix))]


@pytest.fixture(scope="module")
def ten_steps(small_world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ten") / "run"
    run_function(train_runs, 2, [small_world.config, f"run.folder={folder}", "train.steps=10"])
    return folder


@pytest.fixture
def healthy(ten_steps, tmp_path) -> Path:
    """A copy of a run of ten steps with checkpoints of steps 5 and 10."""
    subprocess.run(["cp", "-r", str(ten_steps), str(tmp_path / "run")], check=True)
    return tmp_path / "run"


@pytest.mark.parametrize("every", [5, 1])
def test_a_run_that_fails_up_to_its_end_leaves_a_good_checkpoint(small_world, healthy, every):
    ruin = (*RUIN, "train.steps=16", f"checkpoint.every_steps={every}", "train.max_rollbacks=1")
    # As often as one likes: the good one stays.
    for rollbacks in (1, 0):
        codes, said = train(small_world, healthy, *ruin)
        assert codes == [2, 2], said
        assert said.count("error:") == 1
        assert said.count("rolled back from step 16 to") == rollbacks
        assert "error: steps 12 to 16 were not finite, after 1 rollback" in said
        assert "step-0000010 is good" in said
        assert steps(healthy) == [5, 10]
        # What was saved of the ruined weights is kept, but nothing goes on from it.
        assert steps(healthy, "failed-") == ([11] if every == 1 else [])
    mended = ("train.steps=16", f"checkpoint.every_steps={every}", "train.max_rollbacks=1")
    codes, said = train(small_world, healthy, *mended)
    assert codes == [0, 0], said
    assert "resuming from" in said
    assert steps(healthy)[-1] == 16
    assert steps(healthy, "failed-") == []


def test_one_bad_batch_at_the_end_does_not_end_the_run(small_world, tmp_path):
    # Step 9 takes the samples from 128 to 144, and after a rollback others.
    common = [f"run.folder={tmp_path}", "train.steps=9", "checkpoint.every_steps=8"]
    said = run_function(train_on_faulty_data, 2, small_world.config, [(128, 144)], *common)
    assert said == [None, None]
    assert steps(tmp_path) == [8, 9]


def test_a_bad_batch_at_the_end_of_a_run_without_checkpoints_loses_nothing(small_world, tmp_path):
    common = [f"run.folder={tmp_path}", "train.steps=9", "checkpoint.every_steps=100"]
    said, _ = run_function(train_on_faulty_data, 2, small_world.config, [(128, 144)], *common)
    assert "there was no checkpoint to roll back to; step 8 is saved as the last" in said
    assert steps(tmp_path) == [9]


def test_a_signal_while_steps_fail_keeps_the_good_one(small_world, healthy):
    never = ("train.steps=4000", "train.max_skipped_steps=4000", "checkpoint.every_steps=2000")
    ranks = start(small_world, healthy, *RUIN, *never)
    wait_for(healthy / "skipped.jsonl", ranks)
    for process in ranks:
        process.send_signal(signal.SIGTERM)
    said = "".join(process.output(seconds=100) for process in ranks)
    assert [process.returncode for process in ranks] == [75, 75], said
    (stopped_at,) = set(re.findall(r"stopped by a signal at step (\d+) \(\d+ skipped", said))
    # The weights were ruined before; what is saved of them is no obstacle to going on.
    assert steps(healthy)[-2:] == [10, int(stopped_at)]
    mended = (f"train.steps={int(stopped_at) + 9}", "train.max_skipped_steps=2")
    codes, said = train(small_world, healthy, *mended, "--allow-config-change")
    assert codes == [0, 0], said
    assert "rolled back" in said
    assert steps(healthy)[-1] == int(stopped_at) + 9


def test_what_falls_due_at_a_skipped_step_is_done_after_the_next(small_world, tmp_path):
    # Steps 4 and 5 take the samples from 48 to 80.
    overrides = [
        f"run.folder={tmp_path}",
        "train.steps=9",
        "checkpoint.every_steps=4",
        "checkpoint.keep_last=9",
        "monitor.images_every_steps=5",
        "monitor.num_images=4",
    ]
    run_function(train_on_faulty_data, 2, small_world.config, [(48, 80)], *overrides)
    assert steps(tmp_path) == [6, 8, 9]
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["step-0000006.png"]
