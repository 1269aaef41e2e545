"""A small VAE with random weights, saved as diffusers saves one."""

from pathlib import Path

import torch

from srepa_ds.codec.config import CodecConfig
from srepa_ds.codec.table import build_codec
from srepa_ds.codec.vae import VaeCodec

DOWNSAMPLING = 4
CHANNELS = 4


def write_vae(
    folder: Path, *, seed: int = 0, decoder_seed: int | None = None, levels: int = 3, **config
) -> Path:
    """Writes an `AutoencoderKL` to `folder` and returns it; each level but one halves the sides.

    With `decoder_seed`, its decoder has other weights than the encoder's seed gives it.
    """
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        vae = _built(AutoencoderKL, seed, levels, config)
        if decoder_seed is not None:
            other = _built(AutoencoderKL, decoder_seed, levels, config)
            vae.decoder.load_state_dict(other.decoder.state_dict())
            vae.post_quant_conv.load_state_dict(other.post_quant_conv.state_dict())
    vae.save_pretrained(folder)
    return folder


def opened(folder: Path, **settings) -> VaeCodec:
    """Returns the codec of a VAE in a folder."""
    return build_codec(CodecConfig(kind="vae", weights=folder, **settings))


def _built(kind, seed: int, levels: int, config):
    torch.manual_seed(seed)
    vae = kind(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        norm_num_groups=4,
        latent_channels=CHANNELS,
        layers_per_block=1,
        **{"sample_size": 32, **config},
    )
    with torch.no_grad():
        # Random weights hardly tell images apart otherwise.
        vae.quant_conv.weight.mul_(4)
    return vae
