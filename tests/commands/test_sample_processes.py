"""`srepa-ds sample` by processes that do not know of each other, killed and paused."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders import contents
from places import ROOT, WORKERS

from srepa_ds.config.experiment import load_config
from srepa_ds.model.sit import SiT
from srepa_ds.schema import to_tree
from srepa_ds.weights.exported import write_model

SECONDS = 120


@pytest.fixture
def settings(small_world, tmp_path):
    """Returns the settings of a set that takes a few seconds; its model is not trained."""
    given = [f"run.folder={tmp_path}/run", "sample.num_samples=97", "sample.batch_size=2"]
    given += ["sample.num_steps=6", "sample.outputs=[npz, shards]"]
    config = load_config(small_world.config, given)
    provenance = {"checkpoint": "none", "step": 5, "weights": "ema"}
    weights = SiT(config.model).state_dict()
    write_model(tmp_path / "run/export", weights, config=to_tree(config), provenance=provenance)
    return given


def started(*arguments: object) -> subprocess.Popen:
    """Starts `python ARGUMENTS` in a session of its own: all its processes can be killed."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def output_of(process: subprocess.Popen) -> str:
    said, complaints = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, complaints
    return said


def kill_soon(process: subprocess.Popen, folder: Path, seconds: float) -> None:
    """Kills a command so long after it has drawn something."""
    try:
        deadline = time.monotonic() + SECONDS
        while process.poll() is None and not list(folder.glob("parts/*.safetensors")):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(seconds)
        assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
def test_killed_and_paused_at_random_the_set_is_the_same(
    small_world, settings, tmp_path, monkeypatch
):
    chance = random.Random(3)
    folder = tmp_path / "killed"
    on_two_ranks = ["-m", "srepa_ds", "sample", small_world.config, *settings, "--ranks", "2"]
    process = started(*on_two_ranks, f"sample.folder={folder}")
    kill_soon(process, folder, chance.uniform(0, 0.3))
    # A paused process looks dead after this time only; one that was killed does at once.
    monkeypatch.setenv("SREPA_CLAIM_SECONDS", "2")
    worker = WORKERS / "sample_processes.py"
    said = output_of(started(worker, small_world.config, tmp_path, chance.randrange(99), *settings))
    seen = json.loads(said.strip().split("\n")[-1])
    assert seen["killed"]["kills"] >= 4
    assert seen["killed"]["was_unfinished"]
    assert seen["killed"]["codes"] == [0, 0]
    assert seen["paused"]["codes"] == [0, 0]
    assert seen["paused"]["finished"]
    expected = contents(tmp_path / "undisturbed")
    assert {"samples.npz", "shards/index.json", "contact_sheet.png"} < set(expected)
    for name in ("killed", "paused"):
        assert contents(tmp_path / name) == expected
