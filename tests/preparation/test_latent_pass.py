"""While a batch is encoded the next one is decoded, and no more than that."""

import threading

import pytest
import torch
from image_tree import config_of, write_tree
from torch.nn import functional as F

from srepa_ds.codec.identity import IdentityCodec
from srepa_ds.commands.prepare import prepare
from srepa_ds.data.shards import ShardDataset
from srepa_ds.errors import DataError

SECONDS = 20


class WatchedCodec(IdentityCodec):
    """Takes the mean of patches, as soon as the next batch is being read."""

    identity = {"kind": "vae", "encoder_sha256": "of a test"}

    def __init__(self):
        self.reads = threading.Semaphore(0)
        self.num_read = 0
        self.num_encoded = 0
        self.waits_for = ()

    def latent_shape(self, image_shape):
        return (3, image_shape[1] // 2, image_shape[2] // 2)

    def moments(self, images):
        if self.num_encoded in self.waits_for:
            assert self.reads.acquire(timeout=SECONDS)
            assert self.num_read == self.num_encoded + 2
        self.num_encoded += 1
        means = F.avg_pool2d(images.float(), 2)
        return torch.cat((means, torch.ones_like(means)), dim=1)


@pytest.fixture
def watched(monkeypatch):
    codec, read = WatchedCodec(), ShardDataset.read

    def watched_read(dataset, indices, **options):
        codec.num_read += 1
        if codec.num_read - 1 in {number + 1 for number in codec.waits_for}:
            codec.reads.release()
        return read(dataset, indices, **options)

    monkeypatch.setattr(ShardDataset, "read", watched_read)
    monkeypatch.setattr("srepa_ds.commands.prepare._codec", lambda config, rank: codec)
    return codec


@pytest.fixture
def config(tmp_path):
    latents = {"codec": {"kind": "vae", "weights": "none"}, "batch_size": 2, "dtype": "fp32"}
    changes = {"samples_per_shard": 8, "holdout_fraction": 0.0, "latents": latents}
    tree = write_tree(tmp_path / "tree", num_images=8)
    return config_of(tmp_path / "p.yaml", tree, tmp_path / "out", **changes)


def test_one_batch_is_read_ahead(watched, config):
    # The last of four batches has none after it.
    watched.waits_for = (0, 1, 2)
    part = prepare(config)["train"]
    batch = part.read(torch.arange(8))
    expected = F.avg_pool2d(batch.images.float(), 2)
    assert torch.equal(batch.moments[:, :3], expected)


def test_an_error_while_reading_ahead_ends_the_preparation(watched, config, monkeypatch):
    read, threads = ShardDataset.read, threading.active_count()

    def failing(dataset, indices, **options):
        if 4 in indices:
            raise DataError("shard-00000.safetensors: cannot be read")
        return read(dataset, indices, **options)

    monkeypatch.setattr(ShardDataset, "read", failing)
    with pytest.raises(DataError, match="cannot be read"):
        prepare(config)
    assert watched.num_encoded == 2
    assert threading.active_count() == threads
    assert not list((config.output / "train").glob("latents*"))


def test_an_error_of_the_encoder_leaves_no_thread(watched, config, monkeypatch):
    threads = threading.active_count()

    def moments(images):
        raise DataError("not enough memory")

    monkeypatch.setattr(watched, "moments", moments)
    with pytest.raises(DataError, match="not enough memory"):
        prepare(config)
    assert threading.active_count() == threads
