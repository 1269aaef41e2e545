"""How bytes are read: which ones, how many at once, and again after errors that pass."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from latent_data import NUM_CLASSES, image, latent, write_data

from srepa_ds.data import reading, stored_files
from srepa_ds.data.loader import DataConfig
from srepa_ds.data.reading import Reading, default_threads, file_system_of, is_network
from srepa_ds.data.shards import Parts, ShardDataset
from srepa_ds.errors import DataError

STORAGES = ("raw", "png", "webp")
COUNT = 20
MOUNTS = r"""/dev/vda / ext4 rw 0 0
server:/export /data nfs4 rw 0 0
/dev/sdb /data/local xfs rw 0 0
ceph-fuse /mnt/with\040space fuse.ceph-fuse rw 0 0
old /over lustre rw 0 0
new /over tmpfs rw 0 0
"""


@pytest.fixture
def no_wait(monkeypatch):
    monkeypatch.setattr(stored_files, "_WAIT_SECONDS", 0.001)


@pytest.fixture
def reads(monkeypatch):
    """Records the file and the number of bytes of each read."""
    found, whole = [], os.preadv

    def recorded(descriptor, rooms, offset):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        found.append((os.path.basename(path).split("-")[0], sum(len(room) for room in rooms)))
        return whole(descriptor, rooms, offset)

    monkeypatch.setattr(os, "preadv", recorded)
    return found


def check(batch, indices):
    for number, index in enumerate(indices.tolist()):
        if batch.images is not None:
            expected = torch.from_numpy(image(index)).permute(2, 0, 1)
            assert torch.equal(batch.images[number], expected)
        if batch.moments is not None:
            assert torch.equal(batch.moments[number], latent(index))
        assert int(batch.labels[number]) == index % NUM_CLASSES


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/home/me", "ext4"),
        ("/data/imagenet", "nfs4"),
        ("/data/local/imagenet", "xfs"),
        ("/database", "ext4"),
        ("/mnt/with space/a", "fuse.ceph-fuse"),
        ("/over/it", "tmpfs"),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(tmp_path, folder, kind):
    table = tmp_path / "mounts"
    table.write_text(MOUNTS)
    assert file_system_of(Path(folder), table) == kind


@pytest.mark.parametrize(("kind", "threads"), [("ext4", 1), ("nfs4", 8), ("fuse.s3fs", 8)])
def test_far_disks_get_threads(tmp_path, monkeypatch, kind, threads):
    assert is_network(kind) == (threads > 1)
    monkeypatch.setattr(reading, "file_system_of", lambda _: kind)
    assert default_threads(tmp_path) == threads
    assert DataConfig(folder=tmp_path).reading() == Reading(threads, 3)
    assert DataConfig(folder=tmp_path, read_threads=5).reading().threads == 5


def test_a_system_without_a_table_of_mounts_counts_as_local(tmp_path):
    assert file_system_of(tmp_path, tmp_path / "none") == ""
    assert not is_network("")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("most_open", [160, 2])
def test_threads_read_the_same(tmp_path, monkeypatch, storage, most_open):
    monkeypatch.setattr(stored_files, "_MOST_OPEN", most_open)
    dataset = ShardDataset(write_data(tmp_path / "a", storage=storage, samples_per_shard=3))
    indices = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0)).repeat(2)
    for threads in (1, 3, 8):
        check(dataset.read_by(Reading(threads=threads)).read(indices), indices)


def test_reads_wait_beside_each_other(tmp_path, monkeypatch):
    whole, at_once, most, lock = os.preadv, 0, 0, threading.Lock()

    def slow(*arguments):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.01)
        with lock:
            at_once -= 1
        return whole(*arguments)

    dataset = ShardDataset(write_data(tmp_path / "a"))
    monkeypatch.setattr(os, "preadv", slow)
    indices = torch.arange(0, COUNT, 2)
    for threads in (1, 4):
        most = 0
        check(dataset.read_by(Reading(threads=threads)).read(indices), indices)
        assert most == threads


@pytest.mark.parametrize("storage", STORAGES)
def test_neighbours_are_one_read(tmp_path, reads, storage):
    dataset = ShardDataset(write_data(tmp_path / "a", storage=storage, samples_per_shard=10))
    dataset.make_ready()
    reads.clear()
    indices = torch.tensor([4, 5, 6, 7, 8, 9, 10, 11, 3, 4, 2])
    check(dataset.read(indices), indices)
    kinds = [kind for kind, _ in reads]
    # 4 to 9, 10 and 11 in the next file, 3 and 4, 2.
    assert kinds == ["shard"] * 4 + ["latents"] * 4 or kinds == ["latents"] * 4 + ["shard"] * 4


@pytest.mark.parametrize("storage", STORAGES)
def test_only_the_parts_asked_for_are_read(tmp_path, reads, storage):
    folder = write_data(tmp_path / "a", storage=storage)
    indices = torch.tensor([3, 17, 9])
    latents = ShardDataset(folder, parts=Parts(images=False))
    reads.clear()
    batch = latents.read(indices)
    assert batch.images is None
    check(batch, indices)
    moments = latent(0).nbytes
    assert [r for r in reads if r[0] == "latents"] == [("latents", moments)] * 3
    # Of the shards only labels: samples 3, 17 and 9 lie in three files of six.
    assert [r for r in reads if r[0] == "shard"] == [("shard", 6 * 8)] * 3
    reads.clear()
    check(latents.read(indices), indices)
    assert reads == [("latents", moments)] * 3

    pixels = ShardDataset(folder, parts=Parts(moments=False))
    reads.clear()
    batch = pixels.read(indices)
    assert batch.moments is None
    check(batch, indices)
    assert {kind for kind, _ in reads} == {"shard"}


def failing(monkeypatch, number, times):
    """Makes the first `times` reads fail with an error."""
    whole, left = os.preadv, [times]

    def fail(*arguments):
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return whole(*arguments)

    monkeypatch.setattr(os, "preadv", fail)
    return left


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN])
def test_errors_that_pass_are_survived(tmp_path, monkeypatch, no_wait, caplog, number, threads):
    data = ShardDataset(write_data(tmp_path / "a", storage="webp"))
    dataset = data.read_by(Reading(threads=threads))
    indices = torch.tensor([1, 14, 8])
    left = failing(monkeypatch, number, 2)
    check(dataset.read(indices), indices)
    assert left == [0]
    (record,) = [r for r in caplog.records if "again" in r.message]
    assert record.getMessage().endswith("; reading it again, up to 2 times")


@pytest.mark.parametrize("attempts", [1, 3])
def test_errors_that_last_are_raised(tmp_path, monkeypatch, no_wait, attempts):
    data = ShardDataset(write_data(tmp_path / "a"))
    dataset = data.read_by(Reading(attempts=attempts))
    left = failing(monkeypatch, errno.EIO, 1000)
    tried = "" if attempts == 1 else " in 3 attempts"
    words = rf"shard-00000\.safetensors: cannot be read any more{tried} \(Input/output error\)"
    with pytest.raises(DataError, match=words):
        dataset.labels  # noqa: B018
    assert left == [1000 - 4 * attempts]


def test_errors_that_do_not_pass_are_raised_at_once(tmp_path, monkeypatch):
    dataset = ShardDataset(write_data(tmp_path / "a"))
    left = failing(monkeypatch, errno.EISDIR, 1000)
    with pytest.raises(DataError, match="Is a directory"):
        dataset.read(torch.tensor([1]))
    assert left == [999]


def test_the_waits_grow(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    dataset = ShardDataset(write_data(tmp_path / "a"))
    failing(monkeypatch, errno.ETIMEDOUT, 3)
    dataset.read_by(Reading(attempts=4)).read(torch.tensor([1]))
    assert waits == [1.0, 2.0, 3.0]


def test_a_pool_of_threads_survives_forking(tmp_path):
    dataset = ShardDataset(write_data(tmp_path / "a")).read_by(Reading(threads=4))
    indices = torch.arange(0, COUNT, 2)
    check(dataset.read(indices), indices)
    child = os.fork()
    if child == 0:
        try:
            check(dataset.read(indices), indices)
            os._exit(0)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 20
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if done == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done[1] == 0
