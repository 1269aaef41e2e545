"""Draws from the posterior of a VAE, and maps its space to the diffusion model's."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from srepa_ds.codec.config import PerChannel
from srepa_ds.codec.latent_codec import LatentValues
from srepa_ds.errors import DataError
from srepa_ds.noise import NoiseStream, normal


def drawn(
    moments: Float[Tensor, "batch moments h w"],
    values: LatentValues,
    positions: Int[Tensor, " batch"],
    *,
    seed: int,
) -> Float[Tensor, "batch channels h w"]:
    """Returns mean + std x noise in fp32, or what `moments` hold if that is a draw already.

    The noise is a function of seed and position: every epoch draws again, as REPA does.
    """
    moments = moments.to(torch.float32)
    if values == "samples":
        return moments
    mean, std = moments.chunk(2, dim=1)
    return mean + std * normal(seed, NoiseStream.POSTERIOR, positions, tuple(mean.shape[1:]))


class Affine:
    """The map (z - shift) x scale from a codec's space to the model's, per channel or for all."""

    def __init__(self, scale: PerChannel, shift: PerChannel):
        self._scale = torch.tensor(scale, dtype=torch.float32)
        self._shift = torch.tensor(shift, dtype=torch.float32)

    def forward(self, z: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
        """Returns the model's latents of a codec's."""
        return (z - _planes(self._shift, z)) * _planes(self._scale, z)

    def inverse(self, latents: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
        """Returns the codec's latents of the model's."""
        return latents / _planes(self._scale, latents) + _planes(self._shift, latents)


def _planes(values: Tensor, like: Tensor) -> Tensor:
    moved = values.to(like.device, like.dtype)
    if moved.ndim and len(moved) != like.shape[1]:
        raise DataError(
            f"codec.scale or codec.shift has {len(moved)} numbers, and latents have "
            f"{like.shape[1]} channels; give one number for each"
        )
    return moved.view(-1, 1, 1)
