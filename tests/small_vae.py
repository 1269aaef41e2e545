"""A small VAE with random weights, saved as diffusers saves one."""

from pathlib import Path

import torch

DOWNSAMPLING = 4
CHANNELS = 4


def write_vae(folder: Path, *, seed: int = 0, decoder_seed: int | None = None, **config) -> Path:
    """Writes an `AutoencoderKL` of 3 levels to `folder` and returns it.

    With `decoder_seed`, its decoder has other weights than the encoder's seed gives it.
    """
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        vae = _built(AutoencoderKL, seed, config)
        if decoder_seed is not None:
            other = _built(AutoencoderKL, decoder_seed, config)
            vae.decoder.load_state_dict(other.decoder.state_dict())
            vae.post_quant_conv.load_state_dict(other.post_quant_conv.state_dict())
    vae.save_pretrained(folder)
    return folder


def _built(kind, seed: int, config):
    torch.manual_seed(seed)
    vae = kind(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=CHANNELS,
        layers_per_block=1,
        sample_size=32,
        **config,
    )
    with torch.no_grad():
        # Random weights hardly tell images apart otherwise.
        vae.quant_conv.weight.mul_(4)
    return vae
