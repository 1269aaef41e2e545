"""Killed at any moment, a command that writes data gives the same when it is run again."""

import numpy as np
import pytest
from builders import contents
from kills import killed_at
from small_data import DESCRIBED, prepare, store
from torch import nn

from srepa_ds.data.shard_writer import ShardWriter
from srepa_ds.encoders import teacher_folder


def teach(folder):
    """Does what `srepa-ds teacher` does but for the training."""
    if teacher_folder.finished_accuracy(folder, {"seed": 1}) is not None:
        return
    with teacher_folder.claimed(folder):
        encoder = nn.Linear(2, 2)
        nn.init.ones_(encoder.weight)
        nn.init.zeros_(encoder.bias)
        teacher_folder.save(folder, encoder, {"heldout_accuracy": 0.5, "identity": {"seed": 1}})


@pytest.mark.parametrize("command", ["prepare", "store", "teach"])
def test_killed_at_any_moment_the_next_run_completes(command, tmp_path):
    shards = tmp_path / "shards"
    prepare(shards)
    run = {"prepare": prepare, "store": lambda folder: store(shards, folder), "teach": teach}
    undisturbed = tmp_path / "undisturbed"
    run[command](undisturbed)
    expected, moment = contents(undisturbed), 0
    while True:
        moment += 1
        folder = tmp_path / f"{command}-{moment}"
        if not killed_at(moment, lambda folder=folder: run[command](folder), folder):
            break
        run[command](folder)
        assert contents(folder) == expected, moment
    assert moment > 8


def test_killed_twice_the_third_run_completes(tmp_path):
    prepare(tmp_path / "undisturbed")
    expected = contents(tmp_path / "undisturbed")
    for moment in range(1, 20, 3):
        folder = tmp_path / str(moment)
        # With its first shard written and its index not.
        assert killed_at(16, lambda folder=folder: prepare(folder), folder)
        assert killed_at(moment, lambda folder=folder: prepare(folder), folder)
        prepare(folder)
        assert contents(folder) == expected, moment


def test_killed_while_it_clears_up_the_next_run_completes(tmp_path):
    def fail(folder):
        try:
            with ShardWriter(folder, description=DESCRIBED, samples_per_shard=1) as writer:
                for number in range(2):
                    writer.add(np.zeros((2, 2, 3), dtype=np.uint8), number)
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass

    prepare(tmp_path / "undisturbed")
    expected = contents(tmp_path / "undisturbed")
    for moment in range(1, 100):
        folder = tmp_path / str(moment)
        if not killed_at(moment, lambda folder=folder: fail(folder), folder):
            break
        prepare(folder)
        assert contents(folder) == expected, moment
    assert 20 < moment < 99


@pytest.mark.parametrize("text", ["", '{"format": "srepa'])
def test_a_marker_that_never_got_its_name_is_no_obstacle(tmp_path, text):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "preparing.json.partial").write_text(text)
    prepare(folder)
    prepare(tmp_path / "undisturbed")
    assert contents(folder) == contents(tmp_path / "undisturbed")
