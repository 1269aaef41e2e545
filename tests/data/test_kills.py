"""Killed at any moment, a command that writes data gives the same when it is run again."""

import numpy as np
import pytest
import torch
from builders import contents
from kills import killed_at
from torch import nn

from srepa_ds.data.shard_index import DatasetDescription
from srepa_ds.data.shard_writer import ShardWriter, is_prepared, remove_marker
from srepa_ds.data.shards import ShardDataset
from srepa_ds.data.stored_tokens import as_stored
from srepa_ds.data.token_index import TokenDescription, is_finished
from srepa_ds.data.token_store import TokenStore
from srepa_ds.data.token_writer import TokenStoreWriter, claimed
from srepa_ds.encoders import teacher_folder

DESCRIBED = DatasetDescription({"name": "test"}, (3, 2, 2), ("zero", "one"))


def prepare(folder, *, samples_per_shard=2):
    """Does what `srepa-ds prepare` does for one part."""
    if is_prepared(folder, DESCRIBED):
        remove_marker(folder)
        return
    with ShardWriter(folder, description=DESCRIBED, samples_per_shard=samples_per_shard) as writer:
        for number in range(3):
            writer.add(np.full((2, 2, 3), number, dtype=np.uint8), number % 2)
        writer.attach("preview.png", b"picture")


def store(shards, folder):
    """Does what `srepa-ds prepare --teacher` does for one store."""
    if is_finished(folder):
        TokenStore(folder).verify()
        return
    index = ShardDataset(shards).index
    described = TokenDescription(
        dataset_id=index.dataset_id,
        teacher={"name": "test"},
        storage="bf16",
        grid=(1, 2),
        width=3,
        has_cls=False,
    )
    writer = TokenStoreWriter(folder, described, index.shards)
    with claimed(folder):
        for number in writer.missing():
            count = index.shards[number].num_samples
            writer.write(number, [as_stored(torch.ones(count, 2, 3), None, storage="bf16")])
        writer.finish(writer.entry(number) for number in range(len(writer.shards)))


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
    expected, moment = contents(tmp_path / "undisturbed"), 0
    while True:
        moment += 1
        folder = tmp_path / str(moment)
        # With its shards written and its index not.
        assert killed_at(16, lambda folder=folder: prepare(folder), folder)
        if not killed_at(moment, lambda folder=folder: prepare(folder), folder):
            break
        prepare(folder)
        assert contents(folder) == expected, moment
    assert moment > 8


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
