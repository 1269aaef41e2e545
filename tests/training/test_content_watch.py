"""Damage found beside a training: all ranks stop, and the steps that read the file are named."""

import json
from types import SimpleNamespace

import pytest
import torch
from builders import write_shards

from srepa_ds.cli import run
from srepa_ds.config.experiment import load_config
from srepa_ds.data import contents
from srepa_ds.data.contents import CHECKED_NAME, ContentCheck
from srepa_ds.data.loader import DataOrder, steps_that_read
from srepa_ds.data.shard_file import shard_name
from srepa_ds.data.shard_index import INDEX_NAME
from srepa_ds.data.shards import ShardDataset
from srepa_ds.distributed import ranks
from srepa_ds.errors import DataError
from srepa_ds.training.content_watch import ContentWatch
from srepa_ds.training.inputs import open_inputs


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("first_step", "first_position"), [(0, 0), (7, 56), (3, 41)])
@pytest.mark.parametrize("samples", [range(0, 5), range(18, 23), range(4, 5)])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_steps_are_those_of_a_plain_search(first_step, first_position, samples, count):
    order, wanted = DataOrder(seed=3, num_samples=23), []
    for step in range(first_step, first_step + count):
        start = first_position + (step - first_step) * 8
        read = order.sample_at(torch.arange(start, start + 8)).tolist()
        if any(sample in samples for sample in read):
            wanted.append(step + 1)
    found = steps_that_read(
        order,
        samples,
        positions=range(first_position, first_position + 8 * count),
        batch_size=8,
        first_step=first_step,
    )
    assert found.tolist() == wanted


@pytest.fixture
def dataset(tmp_path):
    write_shards(tmp_path / "shards", num_samples=100, size=(4, 4))
    return ShardDataset(tmp_path / "shards")


def watch_of(dataset, engine):
    check = ContentCheck(dataset.indexed_files, remembered_in=dataset.folder / CHECKED_NAME)
    return check, ContentWatch(check, dataset, engine, seed=1, batch_size=2)


@pytest.mark.parametrize(
    ("first", "taken", "seen", "words"),
    [
        (0, 0, 0, "\nno step has read it$"),
        (0, 50, 100, r"\n\d+ steps from (\d+) to \d+ read it; checkpoints from step \1 on have"),
        (7, 50, 100, "read it; .*; steps before 8 are not known$"),
        (7, 10, 100, "\nsteps from 8 on may have read it, and so have their checkpoints$"),
    ],
)
def test_the_steps_are_told(dataset, first, taken, seen, words):
    flip(dataset.folder / shard_name(2))
    engine = SimpleNamespace(step_count=first, samples_seen=0)
    check, watch = watch_of(dataset, engine)
    with watch:
        check.wait()
        engine.step_count, engine.samples_seen = first + taken, seen
        with pytest.raises(DataError, match=words) as caught:
            watch.look()
    assert caught.match(rf"{shard_name(2)}: contents changed since it was written")


def test_sound_data_are_never_mentioned(dataset, caplog):
    caplog.set_level("INFO", logger="srepa_ds")
    check, watch = watch_of(dataset, SimpleNamespace(step_count=0, samples_seen=0))
    with watch:
        check.wait()
        watch.look()
    assert caplog.text == ""


def test_one_rank_of_a_machine_reads(dataset, monkeypatch):
    flip(dataset.folder / shard_name(2))
    monkeypatch.setenv("LOCAL_RANK", "1")
    check, watch = watch_of(dataset, SimpleNamespace(step_count=0, samples_seen=0))
    with watch:
        watch.look()
    assert not (dataset.folder / CHECKED_NAME).exists()
    assert check.failure() is None


@pytest.fixture
def opened(small_world, tmp_path):
    """Opens the inputs of a copy of the small world, after `spoil` has changed its folder."""

    def open_after(spoil):
        world = small_world.copied_to(tmp_path / "world")
        spoil(world.folder)
        try:
            return open_inputs(load_config(world.config), ranks.initialize())
        finally:
            ranks.close()

    return open_after


def test_small_data_are_compared_before_the_first_step(opened):
    with pytest.raises(DataError, match=f"{shard_name(1)}: contents changed since it was written"):
        opened(lambda folder: flip(folder / "shards" / shard_name(1)))


def test_swapped_shards_are_compared_before_the_first_step(opened):
    def swap(folder):
        first, second = (folder / "shards" / shard_name(number) for number in (0, 1))
        first.rename(folder / "first")
        second.rename(first)
        (folder / "first").rename(second)

    with pytest.raises(DataError, match=f"{shard_name(0)}: contents changed since it was written"):
        opened(swap)


def test_the_identity_of_a_run_needs_the_contents(opened):
    def lie(folder):
        index = json.loads((folder / "shards" / INDEX_NAME).read_text())
        index["shards"][1]["sha256"] = "0" * 64
        (folder / "shards" / INDEX_NAME).write_text(json.dumps(index))

    with pytest.raises(DataError, match=f"{shard_name(1)}: contents changed .*expected 000"):
        opened(lie)


def test_small_data_leave_no_note(opened):
    inputs = opened(lambda folder: None)
    assert inputs.content_check is None
    assert not (inputs.dataset.folder / CHECKED_NAME).exists()


def test_large_data_are_left_to_the_background(opened, monkeypatch):
    monkeypatch.setattr(contents, "_SMALL", 1)
    inputs = opened(lambda folder: flip(folder / "shards" / shard_name(1)))
    assert inputs.content_check.failure() is None
    inputs.content_check.start()
    assert inputs.content_check.wait().path == inputs.dataset.folder / shard_name(1)
    inputs.content_check.close()


@pytest.mark.slow
def test_a_training_on_large_data_stops_when_a_shard_turns_out_damaged(
    small_world, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(contents, "_SMALL", 1)
    world = small_world.copied_to(tmp_path / "world")
    flip(world.folder / "shards" / shard_name(1))
    settings = ["train.steps=4000", "train.log_every_steps=2", "checkpoint.every_steps=500"]
    assert run(["train", str(world.config), *settings]) == 2
    message = capfd.readouterr().err.partition("error: ")[2]
    assert f"{shard_name(1)}: contents changed since it was written" in message
    assert "read it; checkpoints from step 1 on have learnt from it" in message
    assert list(json.loads((world.folder / "shards" / CHECKED_NAME).read_text())) == [shard_name(0)]
