"""Where a run is, by its files: at every stage of its life, and with every trouble."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from srepa_ds.checkpoint import saving
from srepa_ds.checkpoint.fragment_file import Piece
from srepa_ds.checkpoint.retention import mark_good
from srepa_ds.cli import run
from srepa_ds.commands.status import status
from srepa_ds.config.experiment import load_config
from srepa_ds.config.yaml_text import to_yaml
from srepa_ds.errors import DataError
from srepa_ds.report.status import read_status
from srepa_ds.run_folder import RunFolder
from srepa_ds.telemetry.json_lines import append_line
from srepa_ds.training.history import add_rollback, add_skipped


@pytest.fixture
def begun(small_world, tmp_path) -> RunFolder:
    """A run of 100 steps that has written its configuration and nothing else."""
    folder = tmp_path / "run"
    overrides = [f"run.folder={folder}", "train.steps=100", "train.log_every_steps=10"]
    config = load_config(small_world.config, overrides)
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    return RunFolder(folder)


def train_to(folder: RunFolder, step: int) -> None:
    for at in range(10, step + 1, 10):
        values = {"loss_total": 1 / at, "step_seconds": 2.0, "images_per_second": at / 10}
        append_line(folder.metrics, {"step": at, **values})


def save(folder: RunFolder, step: int) -> Path:
    import torch

    piece = Piece("master", "sit.a", (4,), 0, torch.zeros(4))
    return saving.save(folder.checkpoints, step=step, pieces=[piece], state={}, rank=0)


def age(folder: RunFolder, seconds: float) -> None:
    then = time.time() - seconds
    for path in (folder.metrics, folder.config):
        os.utime(path, (then, then))


def found(folder: RunFolder):
    return read_status(folder.path, now=time.time())


def test_a_run_that_has_written_nothing_yet(begun):
    assert found(begun).state == "not begun"
    assert "none yet" in status(begun.path)


def test_rate_and_remaining_time_are_those_of_the_last_lines(begun):
    train_to(begun, 60)
    one = found(begun)
    assert (one.state, one.step, one.total_steps) == ("training", 60, 100)
    assert one.images_per_second == pytest.approx(3.5)
    assert one.remaining_seconds == 80.0
    text = status(begun.path)
    assert "60 of 100 (60.0%)" in text
    assert "3.5 images/s, 2 s a step, 80 s left" in text


def test_a_run_without_a_process_and_without_lines_has_stopped(begun):
    train_to(begun, 60)
    age(begun, 290)
    assert found(begun).state == "training"
    age(begun, 3600)
    assert found(begun).state == "stopped"


def test_a_run_that_has_just_started_again_is_not_silent(begun):
    train_to(begun, 60)
    age(begun, 3600)
    begun.config.touch()
    assert found(begun).state == "training"


def test_an_imported_run_stands_at_its_checkpoint(begun):
    save(begun, 50)
    assert (found(begun).state, found(begun).step) == ("stopped", 50)


def test_slow_steps_are_no_silence(begun):
    for at in (50, 60):
        append_line(begun.metrics, {"step": at, "step_seconds": 100.0})
    age(begun, 2000)
    assert found(begun).state == "training"


def test_a_process_that_holds_the_folder_and_writes_nothing_is_silent(begun):
    train_to(begun, 60)
    program = (
        "import sys; from pathlib import Path; from srepa_ds.files import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(begun.path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()
        training = found(begun)
        age(begun, 3600)
        silent = found(begun)
        process.communicate(b"")
    assert training.state == "training"
    assert training.process is not None
    assert training.process.startswith(f"{process.pid}: ")
    assert silent.state == "silent"
    assert silent.troubles[0].startswith("no line of the record for 3600 s")
    assert found(begun).process is None


def test_a_finished_run(begun):
    train_to(begun, 100)
    age(begun, 1e6)
    assert found(begun).state == "finished"


def test_the_newest_whole_checkpoint(begun):
    train_to(begun, 60)
    save(begun, 30)
    newest = save(begun, 50)
    assert "step 50" in status(begun.path)
    assert "not yet known to be good; 2 kept" in status(begun.path)
    mark_good(begun.checkpoints, 50)
    checkpoint = found(begun).checkpoint
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.is_good, checkpoint.count) == (50, True, 2)
    assert checkpoint.num_bytes == sum(path.stat().st_size for path in newest.iterdir())
    (newest / "manifest.json").unlink()
    torn = found(begun)
    assert torn.checkpoint is not None
    assert torn.checkpoint.step == 30
    assert any("without a manifest" in text and newest.name in text for text in torn.troubles)


def test_troubles_are_named(begun, monkeypatch):
    train_to(begun, 60)
    assert found(begun).troubles == ()
    assert "trouble     none" in status(begun.path)
    add_skipped(begun, 41, not_finite=["flow"], sample_ids=[1, 2])
    add_skipped(begun, 42, not_finite=["flow", "gradient"], sample_ids=[3])
    add_rollback(begun, 42, to=30, samples_seen=700)
    save(begun, 50).rename(begun.checkpoints / "failed-step-0000050")
    save(begun, 30)
    (begun.checkpoints / ".writing-step-0000060").mkdir()
    (begun.path / "metrics.jsonl.bad").write_text("x\n")
    usage = shutil.disk_usage(begun.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    assert found(begun).troubles == (
        "2 skipped steps, the last 42 (flow, gradient not finite)",
        "1 rollback, the last from 42 to 30",
        "1 checkpoint of steps that failed: failed-step-0000050",
        "a save that was interrupted: .writing-step-0000060",
        "damaged lines were set aside: metrics.jsonl.bad",
        found(begun).troubles[-1],
    )
    assert found(begun).troubles[-1].startswith("0 KB are free on the disk")


def test_a_whole_run_as_json_and_by_its_yaml(small_run, capsys):
    one = small_run()
    one.write_everything()
    assert run(["status", str(one.folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["scores"]["precision"] == 0.625
    assert document["step"] == 5
    assert run(["status", str(one.folder / "config.yaml")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{one.folder}: ")
    assert "precision 0.625" in shown


@pytest.mark.parametrize("make", [
    lambda path: None,
    lambda path: path.mkdir(),
])  # fmt: skip
def test_a_folder_without_a_run_is_named(tmp_path, make):
    make(tmp_path / "run")
    with pytest.raises(DataError, match=r"run: holds no run \(there is no config.yaml"):
        status(tmp_path / "run")


def test_nothing_in_the_folder_changes(begun):
    train_to(begun, 60)
    with begun.metrics.open("a") as file:
        file.write('{"step": 70, "loss_to')
    before = {path: path.stat().st_mtime_ns for path in [begun.path, *begun.path.rglob("*")]}
    status(begun.path)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert {*before} == {begun.path, *begun.path.rglob("*")}
