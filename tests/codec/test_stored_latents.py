"""Latents of any codec train: their channels, scale and shift are settings."""

import pytest
import torch

from srepa_ds.codec.config import CodecConfig
from srepa_ds.codec.table import build_codec
from srepa_ds.data.latent_file import write_latents
from srepa_ds.data.prepared_folder import PreparedFolder
from srepa_ds.data.shard_index import DatasetDescription, LatentDescription, LatentIndex
from srepa_ds.data.shard_writer import StoredSample, write_shard
from srepa_ds.data.shards import ShardDataset
from srepa_ds.errors import DataError
from srepa_ds.noise import NoiseStream, normal
from srepa_ds.schema import validated

# Rows: the shape of a latent, what is stored of it, and how.
KINDS = {
    "sd_vae": ((4, 8, 8), "moments", "fp16"),
    "va_vae": ((32, 4, 4), "samples", "fp32"),
    "rae": ((768, 4, 4), "samples", "fp16"),
}


def written(folder, shape, values, dtype):
    """Returns a data set of ten latents in three shards, and the latents."""
    described = DatasetDescription({"kind": "test"}, (3, 64, 64), ("zero", "one"), pixels=None)
    latents = LatentDescription(
        codec={"origin": "test"}, values=values, dtype=dtype, latent_shape=shape, mirrored=False
    )
    prepared, files, entries = PreparedFolder(folder, described), [], []
    generator = torch.Generator().manual_seed(7)
    stored = 2 * torch.randn(10, *latents.stored_shape, generator=generator).abs() + 1
    with prepared.claimed():
        for number, part in enumerate(stored.split(4)):
            samples = [StoredSample(None, row % 2, f"{number}-{row}") for row in range(len(part))]
            entries.append(write_shard(folder, number, samples, described))
            sha256 = entries[-1].sha256
            files.append(write_latents(folder, number, latents, part, None, shard_sha256=sha256))
        whole = LatentIndex(**dict(latents), files=tuple(files))
        prepared.finish(prepared.index_of(entries, latents=whole))
    return ShardDataset(folder), stored


def codec_of(**settings):
    return build_codec(validated(CodecConfig, {"kind": "stored", **settings}, source="test"))


@pytest.mark.parametrize(("shape", "values", "dtype"), KINDS.values(), ids=KINDS)
def test_latents_are_scaled_and_shifted_per_channel(tmp_path, shape, values, dtype):
    dataset, stored = written(tmp_path, shape, values, dtype)
    scale = torch.linspace(0.5, 2, shape[0]).tolist()
    shift = torch.linspace(-1, 1, shape[0]).tolist()
    codec = codec_of(scale=scale, shift=shift)
    order = torch.tensor([9, 0, 4, 3])
    positions = torch.tensor([100, 3, 1 << 40, 5])
    batch = dataset.read(order, positions=positions)
    assert batch.images is None
    found = codec.encode(batch, seed=11)
    assert found.shape == (4, *shape)
    assert found.dtype == torch.float32
    z = stored[order]
    if values == "moments":
        mean, std = z.chunk(2, dim=1)
        z = mean + std * normal(11, NoiseStream.POSTERIOR, positions, shape)
    planes = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (shift, scale))
    expected = (z - next(planes)) * next(planes)
    tolerance = 4e-3 if dtype == "fp16" else 1e-6
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("shape", "values", "dtype"), KINDS.values(), ids=KINDS)
def test_one_number_serves_all_channels_and_none_leaves_them(tmp_path, shape, values, dtype):
    dataset, _ = written(tmp_path, shape, values, dtype)
    batch = dataset.read(torch.arange(10))
    plain = codec_of().encode(batch, seed=1)
    scaled = codec_of(scale=0.5, shift=2.0).encode(batch, seed=1)
    torch.testing.assert_close(scaled, (plain - 2.0) * 0.5)
    if values == "samples":
        assert torch.equal(plain, batch.moments.float())
        assert torch.equal(plain, codec_of().encode(batch, seed=2))
    else:
        assert not torch.equal(plain, codec_of().encode(batch, seed=2))


def test_numbers_of_other_channels_are_refused(tmp_path):
    dataset, _ = written(tmp_path, *KINDS["va_vae"])
    codec = codec_of(scale=[1.0] * 4)
    with pytest.raises(DataError, match="has 4 numbers, and latents have 32 channels"):
        codec.encode(dataset.read(torch.arange(2)), seed=0)
