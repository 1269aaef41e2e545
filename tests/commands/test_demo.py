"""The demo as a user types it, with little training: every step is an ordinary command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT

from srepa_ds.commands import demo as demo_command
from srepa_ds.commands.demo import FEWEST_IMAGES, MODES, commands, run_demo, shipped_road
from srepa_ds.errors import ConfigError, DataError, OutputError, SRepaError
from srepa_ds.metrics.scores import score


@pytest.mark.parametrize("mode", MODES)
def test_every_command_is_one_of_the_command_line_with_a_shipped_config(mode):
    lines = commands(shipped_road(mode), ["run.folder=runs/x", "train.steps=7"], ranks=3)
    names = [line[0] for line in lines]
    teachers = ["teacher"] * (2 if mode.startswith("reg") else 1)
    assert names == ["prepare", *teachers, "train", "export", "sample", "evaluate", "report"]
    assert all(Path(line[1]).is_file() for line in lines)
    train = names.index("train")
    assert lines[train][2:] == ["run.folder=runs/x", "train.steps=7", "--ranks", "3"]


@pytest.fixture
def started(tmp_path, monkeypatch) -> list[list[str]]:
    """The commands that a demo in an empty folder starts; each of them succeeds."""
    monkeypatch.chdir(tmp_path)
    lines: list[list[str]] = []
    monkeypatch.setattr(demo_command, "_run", lambda arguments: lines.append(arguments) or 0)
    return lines


REFUSED = [
    ({"mode": "srepa-mes"}, "did you mean 'srepa-mse'"),
    ({"steps": 0}, "--steps: Input should be greater than or equal to 1 (given: 0)"),
    ({"steps": 10**30}, "--steps: "),
    ({"ranks": 0}, "--ranks: must be at least 1 (given: 0)"),
    ({"ranks": -2}, "--ranks: must be at least 1"),
    ({"ranks": 3}, "--ranks: cannot share batches of 32 images (given: 3)"),
    ({"ranks": 32, "images": 20}, "--ranks: must be at most the number of images, 20"),
    ({"images": 0}, "--images: "),
    ({"images": 3}, "--images: must be at least 4, to be scored (given: 3)"),
    ({"seed": -1}, "--seed: "),
    ({"seed": 1 << 63}, "--seed: "),
    ({"seed": 10**400}, "--seed: "),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_impossible_values_are_refused_before_the_first_step(started, tmp_path, options, words):
    given = {"mode": "repa", "steps": None, "ranks": 1, "seed": 0, **options}
    with pytest.raises(SRepaError, match=re.escape(words)):
        run_demo(**given)
    assert started == []
    assert list(tmp_path.iterdir()) == []


def test_all_impossible_values_come_at_once(started):
    with pytest.raises(ConfigError) as caught:
        run_demo(mode="reg", steps=0, ranks=0, seed=-1, images=2)
    options = sorted(fault.path for fault in caught.value.faults)
    assert options == ["--images", "--ranks", "--seed", "--steps"]


@pytest.mark.parametrize("place", ["runs", "data", "runs/digits-repa", "data/digits-teacher"])
def test_a_place_that_cannot_be_written_to_is_refused_first(started, tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("a file in the way")
    with pytest.raises(OutputError, match=f"{tmp_path}/{place} is not a folder"):
        run_demo(mode="repa", steps=None, ranks=1, seed=0)
    assert started == []


@pytest.mark.parametrize("package", ["matplotlib", "sklearn"])
def test_a_package_that_a_late_step_needs_is_looked_for_first(started, monkeypatch, package):
    real = demo_command.find_spec
    monkeypatch.setattr(
        demo_command, "find_spec", lambda name: None if name == package else real(name)
    )
    with pytest.raises(SRepaError, match=r"pip install 'srepa_ds\[demo\]'"):
        run_demo(mode="repa", steps=None, ranks=1, seed=0)
    assert started == []


@pytest.mark.parametrize("mode", MODES)
def test_possible_values_start_all_steps(started, mode):
    assert run_demo(mode=mode, steps=1, ranks=2, seed=(1 << 63) - 1, images=4) == 0
    assert started == commands(shipped_road(mode), [
        f"run.folder=runs/digits-{mode}-seed{(1 << 63) - 1}", "train.steps=1",
        f"run.seed={(1 << 63) - 1}", f"sample.seed={(1 << 63) - 1}", "sample.num_samples=4",
    ], ranks=2)  # fmt: skip


@pytest.mark.parametrize(("code", "goes_on"), [(2, False), (1, True), (75, True), (130, True)])
def test_what_a_failed_step_promises(started, monkeypatch, capsys, code, goes_on):
    monkeypatch.setattr(demo_command, "_run", lambda arguments: code)
    assert run_demo(mode="repa", steps=None, ranks=1, seed=0) == code
    said = capsys.readouterr().out
    assert ("continues from here" in said) == goes_on
    assert ("correct what its message names" in said) != goes_on


def test_the_fewest_images_are_those_that_can_be_scored():
    images = torch.randn(FEWEST_IMAGES, 8)
    score(images, images)
    with pytest.raises(DataError):
        score(images[1:], images)


def demo(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "srepa_ds", "demo", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.slow
def test_the_whole_road_and_again(tmp_path):
    options = ("--steps", "6", "--mode", "srepa-kl", "--images", "100")
    done = demo(tmp_path, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n$ srepa-ds ") == 7
    run = tmp_path / "runs" / "digits-srepa-kl"
    scores = json.loads((run / "results.json").read_text())["scores"]
    assert {"frechet_distance", "precision", "recall", "class_accuracy"} == scores.keys()
    samples = run / "samples" / "step-0000006"
    assert (samples / "contact_sheet.png").is_file()
    assert (run / "report.html").stat().st_size > 100_000
    written = (samples / "samples.npz").stat().st_mtime_ns
    again = demo(tmp_path, *options)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "already" in again.stderr
    assert (samples / "samples.npz").stat().st_mtime_ns == written
