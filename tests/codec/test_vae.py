"""The codec `vae` against diffusers itself, and against the formulas of REPA."""

import pytest
import torch
from diffusers import AutoencoderKL
from small_vae import CHANNELS, DOWNSAMPLING, write_vae

from srepa_ds.codec.config import CodecConfig
from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.codec.table import build_codec
from srepa_ds.data.batch import Batch
from srepa_ds.distributed.devices import tensor_float32
from srepa_ds.errors import ConfigError, DataError
from srepa_ds.noise import NoiseStream, normal
from srepa_ds.schema import validated


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae") / "vae")


def codec_of(folder, **settings) -> LatentCodec:
    return build_codec(CodecConfig(kind="vae", weights=folder, **settings))


def pictures(count=5, size=32):
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, size // 4, size // 4, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, scale_factor=4.0).to(torch.uint8)


def batch_of(images=None, moments=None, values="moments", first=0):
    count = len(images if images is not None else moments)
    ids = torch.arange(count)
    return Batch(
        images=images,
        moments=moments,
        latent_values=values,
        labels=ids,
        sample_ids=ids,
        positions=ids + first,
    )


def test_moments_are_diffusers_own(folder):
    images = pictures()
    found = codec_of(folder).moments(images)
    vae = AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        raw = vae._encode(images.float() / 127.5 - 1)
    mean, logvar = raw.chunk(2, dim=1)
    expected = torch.cat((mean, torch.exp(0.5 * logvar.clamp(-30, 20))), dim=1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert found.std() > 0.1


def test_a_draw_is_repas_formula_with_noise_keyed_by_position(folder):
    moments = codec_of(folder).moments(pictures())
    latents = codec_of(folder).encode(batch_of(moments=moments.half(), first=70), seed=5)
    mean, std = moments.half().float().chunk(2, dim=1)
    noise = normal(5, NoiseStream.POSTERIOR, torch.arange(5) + 70, tuple(mean.shape[1:]))
    torch.testing.assert_close(latents, (mean + std * noise) * 0.18215)


def test_a_draw_has_the_mean_and_the_spread_of_its_posterior(folder):
    moments = torch.cat((torch.full((1, 4, 8, 8), 3.0), torch.full((1, 4, 8, 8), 0.5)), dim=1)
    many = batch_of(moments=moments.expand(2000, -1, -1, -1))
    latents = codec_of(folder, scale=1.0).encode(many, seed=0)
    assert abs(float(latents.mean()) - 3.0) < 0.01
    assert abs(float(latents.std()) - 0.5) < 0.01


def test_a_draw_does_not_depend_on_the_batch(folder):
    codec, moments = codec_of(folder), codec_of(folder).moments(pictures())
    whole = codec.encode(batch_of(moments=moments), seed=1)
    last = codec.encode(batch_of(moments=moments[3:], first=3), seed=1)
    assert torch.equal(whole[3:], last)
    assert not torch.equal(whole, codec.encode(batch_of(moments=moments), seed=2))


def test_images_without_stored_latents_are_encoded(folder):
    codec, images = codec_of(folder), pictures()
    stored = codec.encode(batch_of(images=images, moments=codec.moments(images)), seed=1)
    torch.testing.assert_close(codec.encode(batch_of(images=images), seed=1), stored)


def test_samples_are_taken_as_they_are(folder):
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scale, shift = (2.0, 1.0, 0.5, 4.0), (0.0, 1.0, -1.0, 2.0)
    codec = codec_of(folder, scale=scale, shift=shift)
    latents = codec.encode(batch_of(moments=z, values="samples"), seed=9)
    for channel in range(4):
        expected = (z[:, channel] - shift[channel]) * scale[channel]
        torch.testing.assert_close(latents[:, channel], expected)


def test_decoding_is_diffusers_with_truncated_pixels(folder):
    codec = codec_of(folder, batch_size=2)
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = codec.decode(latents)
    vae = AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        decoded = torch.cat([vae.decode(z).sample for z in (latents / 0.18215).split(2)])
    expected = (255 * (decoded + 1) / 2).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert found.shape == (5, 32, 32, 3)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert (found == expected).float().mean() > 0.999


def test_scale_and_shift_of_the_vae_are_used_and_undone(tmp_path):
    folder = write_vae(tmp_path / "vae", scaling_factor=0.5, shift_factor=0.25)
    codec = codec_of(folder)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = codec.encode(batch_of(moments=z, values="samples"), seed=0)
    torch.testing.assert_close(latents, (z - 0.25) * 0.5)
    plain = codec_of(folder, scale=1.0, shift=0.0)
    assert torch.equal(codec.decode(latents), plain.decode(z))


def test_the_latent_s_shape_follows_from_the_image(folder):
    codec = codec_of(folder)
    assert codec.latent_shape((3, 64, 32)) == (CHANNELS, 64 // DOWNSAMPLING, 32 // DOWNSAMPLING)
    assert codec.moments(pictures(2, size=64)).shape == (2, 8, 16, 16)
    with pytest.raises(DataError, match="multiples of 4"):
        codec.latent_shape((3, 64, 30))


def test_the_identity_is_the_encoder_s_alone(tmp_path, folder):
    other_decoder = codec_of(write_vae(tmp_path / "a", decoder_seed=1))
    other_encoder = codec_of(write_vae(tmp_path / "b", seed=2))
    own = codec_of(folder)
    assert own.identity == other_decoder.identity
    assert own.decoding != other_decoder.decoding
    assert own.identity != other_encoder.identity


def test_bf16_moves_moments_a_little(folder):
    exact = codec_of(folder).moments(pictures())
    rounded = codec_of(folder, precision="bf16").moments(pictures())
    assert rounded.dtype == torch.float32
    difference = (rounded - exact).norm() / exact.norm()
    assert 1e-5 < float(difference) < 0.05


def test_tiles_cover_large_images(folder):
    images = pictures(1, size=128)
    tiled = codec_of(folder, tiled=True)
    assert tiled.moments(images).shape == (1, 8, 32, 32)
    assert tiled.decode(torch.zeros(1, 4, 32, 32)).shape == (1, 128, 128, 3)


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set_for_a_block_only(allowed):
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    with tensor_float32(allowed):
        assert {backend.fp32_precision for backend in backends} == {"tf32" if allowed else "ieee"}
    assert [backend.fp32_precision for backend in backends] == before


def test_weights_are_required():
    with pytest.raises(ConfigError, match="weights is required for kind 'vae'"):
        validated(CodecConfig, {"kind": "vae"}, source="test")


def test_settings_of_a_vae_belong_to_a_vae():
    with pytest.raises(ConfigError, match="scale belongs to kind 'vae' or 'stored'"):
        validated(CodecConfig, {"kind": "identity", "scale": 2.0}, source="test")


def test_a_folder_without_a_vae_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(DataError, match=rf"{tmp_path}: not a readable AutoencoderKL"):
        codec_of(tmp_path)


def test_channels_that_do_not_fit_are_told(folder):
    codec = codec_of(folder, scale=(1.0, 2.0))
    with pytest.raises(DataError, match="has 2 numbers, and latents have 4 channels"):
        codec.encode(batch_of(moments=torch.zeros(1, 8, 4, 4)), seed=0)


def test_a_trained_codec_is_used_with_the_weights_of_today(tmp_path):
    trained = CodecConfig(kind="vae", weights=tmp_path / "there", scale=0.5)
    given = CodecConfig(kind="vae", weights=tmp_path / "here", scale=0.7, precision="bf16")
    used = trained.as_used_here(given)
    assert (used.weights, used.precision, used.scale) == (tmp_path / "here", "bf16", 0.5)
    assert trained.as_used_here(CodecConfig()) == trained


def test_the_images_at_once_are_a_fact_of_decoding(folder):
    sixteen, one = codec_of(folder), codec_of(folder, batch_size=1)
    assert (sixteen.decoding["batch_size"], one.decoding["batch_size"]) == (16, 1)
    assert sixteen.space == one.space
