"""Data that fail while they are read: a message or another attempt, never loss or repetition."""

import errno
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from latent_data import image, latent, write_data

from srepa_ds.data import stored_files
from srepa_ds.data.loader import BatchLoader, DataConfig, epoch_permutation
from srepa_ds.data.shards import ShardDataset
from srepa_ds.errors import DataError

COUNT, MICRO, SEED = 40, 4, 2
STORAGES = ("raw", "png", "webp")
FILES = ("shard", "latents")


@pytest.fixture(autouse=True)
def _short_goodbyes(monkeypatch):
    """Loaders of workers that are stuck or dead wait 5 s for them when they are cleared up."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)


@pytest.fixture(params=STORAGES)
def folder(tmp_path, request):
    return write_data(tmp_path / "data", count=COUNT, storage=request.param, samples_per_shard=5)


def loader(folder, *, workers=0, start=0, **settings):
    config = DataConfig(folder=folder, num_workers=workers, prefetch_batches=1, **settings)
    return BatchLoader(
        ShardDataset(folder), config, seed=SEED, micro_batch_size=MICRO, start_position=start
    )


def check(batch, start):
    """Checks that `batch` holds the samples of [start, start + MICRO), whole."""
    positions = list(range(start, start + MICRO))
    order = [epoch_permutation(SEED, p // COUNT, COUNT)[p % COUNT].item() for p in positions]
    assert batch.positions.tolist() == positions
    assert batch.sample_ids.tolist() == order
    for number, sample in enumerate(order):
        assert torch.equal(batch.images[number], torch.from_numpy(image(sample)).permute(2, 0, 1))
        assert torch.equal(batch.moments[number], latent(sample))


def read_until_it_fails(batches):
    """Returns how many batches came, each checked, and the error that ended them."""
    count = 0
    while True:
        try:
            batch = next(batches)
        except DataError as error:
            return count, str(error)
        check(batch, batches.position - MICRO)
        count += 1
        assert count < 100


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_told_and_nothing_is_lost(tmp_path, workers):
    folder = write_data(tmp_path / "data", count=COUNT, storage="webp")
    with loader(folder, workers=workers) as batches:
        for number in range(3):
            check(next(batches), number * MICRO)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        count, said = read_until_it_fails(batches)
        assert "a data worker has failed" in said
        position = batches.position
    # What was delivered stays delivered, and a new loader continues behind it.
    assert position == (3 + count) * MICRO
    with loader(folder, start=position) as batches:
        check(next(batches), position)


def truncate(path: Path) -> None:
    os.truncate(path, 500)


def vanish(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    copy.replace(path)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_truncated_in_use_is_named(folder, kind, workers):
    path = folder / f"{kind}-00003.safetensors"
    with loader(folder, workers=workers) as batches:
        check(next(batches), 0)
        truncate(path)
        count, said = read_until_it_fails(batches)
        assert f"{path}: was truncated while it was in use" in said or (
            f"{path}: was changed or replaced" in said
        )
        assert batches.position == (1 + count) * MICRO
        assert count < COUNT // MICRO + 3


@pytest.mark.parametrize("spoil", [vanish, replace])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_open_is_read_on(folder, kind, spoil):
    with loader(folder) as batches:
        for number in range(COUNT // MICRO):
            check(next(batches), number * MICRO)
        for number in range(8):
            spoil(folder / f"{kind}-{number:05d}.safetensors")
        for number in range(COUNT // MICRO, 3 * COUNT // MICRO):
            check(next(batches), number * MICRO)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("spoil", [vanish, replace])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_lost_before_its_first_use_is_named(tmp_path, kind, spoil, workers):
    folder = write_data(tmp_path / "data", count=COUNT, storage="png", samples_per_shard=5)
    path = folder / f"{kind}-00003.safetensors"
    with loader(folder, workers=workers) as batches:
        spoil(path)
        count, said = read_until_it_fails(batches)
    words = {vanish: "cannot be read any more", replace: "was changed or replaced"}
    assert f"{path}: {words[spoil]}" in said
    assert count < COUNT // MICRO


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("every", [5, 1])
def test_a_disk_that_fails_now_and_then_loses_nothing(folder, monkeypatch, workers, every):
    """Every fifth read fails once; or every read does, for ever."""
    whole, count = os.preadv, 0

    def fail(*arguments):
        nonlocal count
        count += 1
        if count % every == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(*arguments)

    monkeypatch.setattr(stored_files, "_WAIT_SECONDS", 0.001)
    with loader(folder, workers=workers, read_attempts=5) as batches:
        monkeypatch.setattr(os, "preadv", fail)
        if every == 1:
            came, said = read_until_it_fails(batches)
            assert came == 0
            assert "cannot be read any more in 5 attempts (Input/output error)" in said
            return
        for number in range(2 * COUNT // MICRO):
            check(next(batches), number * MICRO)
    assert count > 10 or workers


@pytest.mark.parametrize(("workers", "threads"), [(0, 1), (0, 4), (1, 4)])
def test_a_slow_disk_only_takes_time(tmp_path, monkeypatch, workers, threads):
    whole = os.preadv

    def slow(*arguments):
        time.sleep(0.005)
        return whole(*arguments)

    folder = write_data(tmp_path / "data", count=COUNT, storage="webp")
    monkeypatch.setattr(os, "preadv", slow)
    with loader(folder, workers=workers, read_threads=threads) as batches:
        for number in range(COUNT // MICRO):
            check(next(batches), number * MICRO)


@pytest.mark.parametrize("name", ["image_ends", "image_bytes"])
def test_contradicting_bytes_are_named(tmp_path, name):
    folder = write_data(tmp_path / "data", count=5, storage="png", has_latents=False)
    dataset = ShardDataset(folder)
    path = folder / "shard-00000.safetensors"
    start = dataset._files._files.start(0, name)
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * 7)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    words = {
        "image_ends": r"its image_ends do not rise within its \d+ bytes; delete",
        "image_bytes": r"the image of sample 0 cannot be decoded \(.*\); delete",
    }
    with pytest.raises(DataError, match=words[name]):
        dataset.read(torch.arange(5))
