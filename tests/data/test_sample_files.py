"""Files that change while they are read: what stays open is read on, the rest is named."""

import errno
import gc
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

from srepa_ds.data import stored_files
from srepa_ds.data.loader import BatchLoader, DataConfig
from srepa_ds.data.shard_file import shard_name
from srepa_ds.data.shard_index import DatasetDescription
from srepa_ds.data.shard_writer import ShardWriter
from srepa_ds.data.shards import ShardDataset
from srepa_ds.errors import DataError

COUNT = 30


@pytest.fixture
def folder(tmp_path):
    described = DatasetDescription({"name": "counted"}, (3, 2, 2), tuple("0123456789"))
    with ShardWriter(tmp_path / "a", description=described, samples_per_shard=3) as writer:
        for number in range(COUNT):
            writer.add(np.full((2, 2, 3), number, dtype=np.uint8), number % 10)
    return tmp_path / "a"


def open_files(folder):
    """Returns the shards in `folder` that this process has open."""
    links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    paths = [os.readlink(link) for link in links if os.path.lexists(link)]
    return sorted(os.path.basename(path) for path in paths if path.startswith(f"{folder}/"))


def truncate(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 30)


def replace(path):
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    copy.replace(path)


def touch(path):
    path.write_bytes(path.read_bytes())


def remove(path):
    path.unlink()


def folder_in_its_place(path):
    path.unlink()
    path.mkdir()


def loop_in_its_place(path):
    path.unlink()
    path.symlink_to(path)


BEFORE_USE = {
    truncate: "was changed or replaced while it was in use; leave the files of",
    replace: "was changed or replaced while it was in use",
    touch: "was changed or replaced while it was in use",
    remove: r"cannot be read any more \(No such file or directory\); make the file readable",
    folder_in_its_place: "was changed or replaced while it was in use",
    loop_in_its_place: "cannot be read any more",
}


@pytest.mark.parametrize("spoil", BEFORE_USE)
def test_a_file_that_changes_before_its_first_use_is_named(folder, spoil):
    dataset = ShardDataset(folder)
    dataset.read(torch.arange(3))
    spoil(folder / shard_name(1))
    assert dataset.read(torch.arange(3)).labels.tolist() == [0, 1, 2]
    with pytest.raises(DataError, match=rf"{shard_name(1)}: {BEFORE_USE[spoil]}"):
        dataset.read(torch.arange(4))


@pytest.mark.parametrize("spoil", [replace, remove, folder_in_its_place])
def test_what_is_open_is_read_on(folder, spoil):
    dataset = ShardDataset(folder)
    before = dataset.read(torch.arange(COUNT))
    spoil(folder / shard_name(1))
    assert torch.equal(dataset.read(torch.arange(COUNT)).images, before.images)


def test_a_truncated_file_is_named(folder):
    dataset = ShardDataset(folder)
    dataset.read(torch.arange(COUNT))
    size = (folder / shard_name(1)).stat().st_size
    truncate(folder / shard_name(1))
    words = rf"{shard_name(1)}: was truncated while it was in use: it had {size} bytes, now"
    with pytest.raises(DataError, match=rf"{words} {size - 30}; delete .* prepare it again"):
        dataset.read(torch.tensor([5]))
    # Its labels come first and are still there.
    assert dataset.labels.tolist() == [number % 10 for number in range(COUNT)]
    assert dataset.read(torch.tensor([29])).labels.tolist() == [9]


def test_a_disk_that_fails_is_named(folder, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    dataset = ShardDataset(folder)
    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(stored_files, "_WAIT_SECONDS", 0.001)
    with pytest.raises(
        DataError, match=rf"{shard_name(1)}: cannot be read any more in 3 attempts \(Input/output"
    ):
        dataset.read(torch.tensor([3]))


def test_bytes_that_come_in_pieces_are_put_together(folder, monkeypatch):
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, rooms, at: whole(file, [rooms[0][:5]], at))
    images = ShardDataset(folder).read(torch.arange(COUNT)).images
    assert torch.equal(images[:, 2, 1, 1], torch.arange(COUNT).byte())


def test_few_files_are_open_at_once_and_none_afterwards(folder, monkeypatch):
    monkeypatch.setattr(stored_files, "_MOST_OPEN", 4)
    dataset = ShardDataset(folder)
    for order in (torch.arange(COUNT), torch.arange(COUNT).flip(0), torch.arange(COUNT)):
        assert torch.equal(dataset.read(order).images[:, 0, 0, 0].long(), order)
        assert len(open_files(folder)) == 4
    assert open_files(folder) == [shard_name(number) for number in range(6, 10)]
    assert pickle.loads(pickle.dumps(dataset)).read(torch.tensor([7])).labels.tolist() == [7]
    del dataset
    gc.collect()
    assert open_files(folder) == []


def test_a_file_is_compared_whenever_it_is_opened_again(folder, monkeypatch):
    monkeypatch.setattr(stored_files, "_MOST_OPEN", 1)
    dataset = ShardDataset(folder)
    dataset.read(torch.tensor([0, 3]))
    replace(folder / shard_name(0))
    with pytest.raises(DataError, match=f"{shard_name(0)}: was changed or replaced"):
        dataset.read(torch.tensor([0]))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_raises_the_message_alone(folder, workers):
    dataset = ShardDataset(folder)
    remove(folder / shard_name(4))
    config = DataConfig(folder=folder, num_workers=workers, prefetch_batches=2)
    with BatchLoader(dataset, config, seed=1, micro_batch_size=COUNT) as batches:
        with pytest.raises(DataError, match="cannot be read any more") as caught:
            next(batches)
        assert "Traceback" not in str(caught.value)
        assert "worker" not in str(caught.value)
