"""`srepa-ds prepare` as users run it: killed again and again, in shares at once, within memory."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders import contents
from image_tree import config_of, write_config, write_tree
from places import ROOT
from ranks import run_function
from small_vae import write_vae

from srepa_ds.commands.prepare import prepare

SECONDS = 120


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae") / "vae")


def started(config: Path, *options: str) -> subprocess.Popen:
    """Starts the command in a session of its own, so that all its processes can be killed."""
    return subprocess.Popen(
        [sys.executable, "-m", "srepa_ds", "prepare", str(config), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def killed_after(config: Path, output: Path, seconds: float) -> bool:
    """Kills a preparation on two ranks so long after its beginning; False if it finished before."""
    process = started(config, "--ranks", "2")
    deadline = time.monotonic() + SECONDS
    before = newest(output)
    try:
        while process.poll() is None and newest(output) == before:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(seconds)
        return process.poll() is None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def newest(output: Path) -> tuple[int, ...]:
    """Returns what changes when something is written below `output`."""
    try:
        return tuple(path.stat().st_mtime_ns for path in (output, *sorted(output.glob("*"))))
    except OSError:
        return ()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_five_times_on_two_ranks_the_next_run_completes(seed, vae, tmp_path):
    tree = write_tree(tmp_path / "tree", num_images=240, broken=(5, 90))
    changes = {"image_size": 64, "samples_per_shard": 8, "on_error": "skip"}
    if seed == 0:
        # The others start in half of the time.
        codec = {"kind": "vae", "weights": str(vae)}
        changes["latents"] = {"codec": codec, "batch_size": 3, "mirrored": True}
    undisturbed = config_of(tmp_path / "u.yaml", tree, tmp_path / "undisturbed", **changes)
    prepare(undisturbed)
    expected = contents(tmp_path / "undisturbed")
    chance, kills, attempt = random.Random(seed), 0, 0
    while kills < 5:
        attempt += 1
        output = tmp_path / f"out{attempt}"
        config = write_config(tmp_path / "p.yaml", tree, output, **changes)
        while kills < 5 and killed_after(config, output, chance.uniform(0, 0.7)):
            kills += 1
    process = started(config, "--ranks", "2")
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    assert contents(output) == expected


@pytest.mark.slow
def test_shares_at_the_same_time_give_the_same_and_one_finishes(vae, tmp_path):
    tree = write_tree(tmp_path / "tree", num_images=90)
    latents = {"codec": {"kind": "vae", "weights": str(vae)}, "batch_size": 3}
    prepare(config_of(tmp_path / "u.yaml", tree, tmp_path / "undisturbed", latents=latents))
    for attempt in range(2):
        output = tmp_path / f"out{attempt}"
        config = write_config(tmp_path / "p.yaml", tree, output, latents=latents)
        shares = [started(config, "--share", f"{number}/2") for number in range(2)]
        said = [process.communicate(timeout=SECONDS)[1] for process in shares]
        assert [process.returncode for process in shares] == [0, 0], said
        assert contents(output) == contents(tmp_path / "undisturbed")


def peak_of_preparation(tree: str, output: str, images_per_shard: int) -> int:
    changes = {"image_size": 1024, "pixels": "raw", "holdout_fraction": 0.0, "threads": 2}
    changes["samples_per_shard"] = images_per_shard
    config = config_of(Path(output).with_suffix(".yaml"), Path(tree), Path(output), **changes)
    prepare(config)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.slow
def test_memory_is_little_more_than_one_shard(tmp_path):
    tree = write_tree(tmp_path / "tree", num_images=150)
    peaks = [
        run_function(peak_of_preparation, 1, tree, tmp_path / f"out{count}", count)[0]
        for count in (1, 150)
    ]
    shard = (tmp_path / "out150/train/shard-00000.safetensors").stat().st_size
    assert shard > 470e6
    assert peaks[1] - peaks[0] < 1.2 * shard
