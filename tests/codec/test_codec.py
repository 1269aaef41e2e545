import pytest
import torch

from srepa_ds.codec.config import CODEC_KINDS, CodecConfig
from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.codec.table import LATENT_CODECS, build_codec
from srepa_ds.data.batch import Batch
from srepa_ds.errors import ConfigError, DataError
from srepa_ds.schema import validated


def batch_of(images):
    ids = torch.arange(3)
    return Batch(images=images, moments=None, labels=ids, sample_ids=ids, positions=ids)


@pytest.fixture
def identity():
    return build_codec(CodecConfig())


@pytest.mark.parametrize("kind", ["identity", "stored"])
def test_every_codec_has_the_whole_interface(kind):
    assert isinstance(build_codec(CodecConfig(kind=kind)), LatentCodec)


def test_every_kind_has_a_row():
    assert list(LATENT_CODECS) == list(CODEC_KINDS)


def test_identity_scales_pixels(identity):
    images = torch.arange(256, dtype=torch.uint8)[None, None, None].expand(3, 3, 2, 256)
    latents = identity.encode(batch_of(images), seed=0)
    assert latents.dtype == torch.float32
    expected = images.double() / 127.5 - 1
    torch.testing.assert_close(latents.double(), expected, rtol=0, atol=1e-7)
    assert identity.latent_shape((3, 2, 256)) == tuple(latents.shape[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_identity_truncates_and_clamps(identity, dtype):
    values = torch.tensor([-7.0, -1.0, 0.0, 0.5, 1.0, 1.5], dtype=dtype)
    images = identity.decode(values[None, None, None].expand(2, 3, 4, 6))
    assert images.shape == (2, 4, 6, 3)
    assert images.dtype == torch.uint8
    assert images[0, 0, :, 0].tolist() == [0, 0, 127, 191, 255, 255]


def test_identity_keeps_channels_and_places(identity):
    latents = torch.full((1, 3, 2, 4), -1.0)
    latents[0, 2, 1, 3] = 1.0
    images = identity.decode(latents)
    assert images.nonzero().tolist() == [[0, 1, 3, 2]]


def test_decoding_undoes_encoding_up_to_truncation(identity):
    images = torch.arange(256, dtype=torch.uint8)[None, None, None].expand(3, 3, 1, 256)
    decoded = identity.decode(identity.encode(batch_of(images), seed=0)).permute(0, 3, 1, 2)
    lost = images.int() - decoded.int()
    assert lost.min() >= 0
    assert lost.max() <= 1


def test_shards_without_pixels_are_named(identity):
    with pytest.raises(DataError, match="hold none"):
        identity.encode(batch_of(None), seed=0)


def test_unknown_codec_suggests_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'identity'"):
        validated(CodecConfig, {"kind": "identify"}, source="x")
