"""Killed at any moment, a command that writes data gives the same when it is run again."""

import numpy as np
import pytest
import torch
from builders import contents
from image_tree import config_of, write_tree
from kills import killed_at
from small_data import DESCRIBED, prepare, store
from torch import nn

from srepa_ds.codec.identity import IdentityCodec
from srepa_ds.commands.prepare import prepare as prepare_images
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


class MeanCodec(IdentityCodec):
    """Takes the mean of patches of 2 x 2: enough of a codec to write files of latents."""

    identity = {"kind": "vae", "encoder_sha256": "of a test"}

    def latent_shape(self, image_shape):
        return (3, image_shape[1] // 2, image_shape[2] // 2)

    def moments(self, images):
        means = nn.functional.avg_pool2d(images.float(), 2)
        return torch.cat((means, torch.ones_like(means)), dim=1)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "step"), [(1, 9), (4, 9), (7, 9)])
def test_a_folder_of_images_killed_at_any_moment_is_completed(monkeypatch, tmp_path, first, step):
    monkeypatch.setattr("srepa_ds.commands.prepare._codec", lambda config, rank: MeanCodec())
    tree = write_tree(tmp_path / "tree", num_images=9, broken=(4,))
    changes = {"image_size": 4, "samples_per_shard": 3, "on_error": "skip", "holdout_fraction": 0.4}
    changes["latents"] = {"codec": {"kind": "vae", "weights": "none"}, "batch_size": 2}

    def run(output):
        prepare_images(config_of(output.with_suffix(".yaml"), tree, output, **changes))

    def run_apart(output):
        # This process must not join a group, which forked ones would inherit.
        assert not killed_at(10**9, lambda: run(output), output)

    run_apart(tmp_path / "undisturbed")
    expected = contents(tmp_path / "undisturbed")
    for moment in range(first, 1000, step):
        output = tmp_path / f"out-{moment}"
        if not killed_at(moment, lambda output=output: run(output), output):
            break
        run_apart(output)
        assert contents(output) == expected, moment
    assert 60 < moment < 900


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
