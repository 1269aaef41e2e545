"""Small AutoencoderKL with random weights, saved as diffusers saves them."""

from pathlib import Path

import torch

from srepa_ds.codec.config import CodecConfig
from srepa_ds.codec.table import build_codec
from srepa_ds.codec.vae import VaeCodec


def tiny_vae(folder: Path, *, seed: int = 0) -> Path:
    """Writes a VAE with 4 channels that makes one place of 4 x 4 pixels; returns `folder`."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(16, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
        )
    vae.save_pretrained(folder)
    return folder


def opened(folder: Path, **settings) -> VaeCodec:
    """Returns the codec of a VAE in a folder."""
    return build_codec(CodecConfig(kind="vae", weights=folder, **settings))
