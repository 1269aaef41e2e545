"""The demo as a user types it, with little training: every step is an ordinary command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from srepa_ds.commands.demo import MODES, commands, run_demo
from srepa_ds.errors import ConfigError


@pytest.mark.parametrize("mode", MODES)
def test_every_command_is_one_of_the_command_line_with_a_shipped_config(mode):
    lines = commands(mode, ["run.folder=runs/x", "train.steps=7"], ranks=3)
    names = [line[0] for line in lines]
    teachers = ["teacher"] * (2 if mode.startswith("reg") else 1)
    assert names == ["prepare", *teachers, "train", "export", "sample", "evaluate", "report"]
    assert all(Path(line[1]).is_file() for line in lines)
    train = names.index("train")
    assert lines[train][2:] == ["run.folder=runs/x", "train.steps=7", "--ranks", "3"]


def test_an_unknown_mode_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'srepa-mse'"):
        run_demo(mode="srepa-mes", steps=None, ranks=2, seed=0)


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
