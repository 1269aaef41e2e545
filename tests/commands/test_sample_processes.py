"""`srepa-ds sample` by processes that do not know of each other, killed and paused."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from builders import contents
from places import ROOT
from ranks import run_worker

from srepa_ds.config.experiment import load_config
from srepa_ds.model.sit import SiT
from srepa_ds.schema import to_tree
from srepa_ds.weights.exported import write_model

SECONDS = 120


@pytest.fixture
def settings(small_world, tmp_path):
    """Returns the settings of a set that takes a few seconds; its model is not trained."""
    given = [f"run.folder={tmp_path}/run", "sample.num_samples=117", "sample.batch_size=2"]
    given += ["sample.num_steps=8", "sample.outputs=[npz, shards]"]
    config = load_config(small_world.config, given)
    provenance = {"checkpoint": "none", "step": 5, "weights": "ema"}
    weights = SiT(config.model).state_dict()
    write_model(tmp_path / "run/export", weights, config=to_tree(config), provenance=provenance)
    return given


def killed_on_two_ranks(config, settings, folder, chance) -> None:
    """Kills a command on two ranks so that some of the set is drawn."""
    process = subprocess.Popen(
        [sys.executable, "-m", "srepa_ds", "sample", str(config), *settings, "--ranks", "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + SECONDS
        while process.poll() is None and not list(folder.glob("parts/*.safetensors")):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.5))
    finally:
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
def test_killed_and_paused_at_random_the_set_is_the_same(
    small_world, settings, tmp_path, monkeypatch
):
    seed = 3
    killed_on_two_ranks(
        small_world.config,
        [*settings, f"sample.folder={tmp_path}/killed"],
        tmp_path / "killed",
        random.Random(seed),
    )
    # A paused process looks dead after this time only; one that was killed does at once.
    monkeypatch.setenv("SREPA_CLAIM_SECONDS", "2")
    (said,) = run_worker("sample_processes", 1, small_world.config, tmp_path, str(seed), *settings)
    seen = json.loads(said.strip().split("\n")[-1])
    assert seen["killed"]["kills"] >= 4
    assert seen["killed"]["parts"] >= 4
    assert seen["paused"]["codes"] == [0, 0]
    assert seen["paused"]["finished"]
    assert not seen["paused"]["ended"]

    finish = [sys.executable, "-m", "srepa_ds", "sample", str(small_world.config), *settings]
    finish += [f"sample.folder={tmp_path}/killed", "--ranks", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(finish, env=environment, timeout=SECONDS, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    expected = contents(tmp_path / "undisturbed")
    assert {"samples.npz", "shards/index.json", "contact_sheet.png"} < set(expected)
    for name in ("killed", "paused"):
        assert contents(tmp_path / name) == expected
