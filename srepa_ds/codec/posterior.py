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
        self._scale = scale
        self._shift = shift
        self._on_device: dict[tuple[PerChannel, torch.device], Tensor] = {}

    def forward(self, z: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
        """Returns the model's latents of a codec's."""
        return (z - self._planes(self._shift, z)) * self._planes(self._scale, z)

    def inverse(self, latents: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
        """Returns the codec's latents of the model's."""
        scale, shift = self._planes(self._scale, latents), self._planes(self._shift, latents)
        return latents / scale + shift

    def _planes(self, values: PerChannel, like: Tensor) -> Tensor | float:
        """Returns what is to be multiplied with `like`; raises DataError for other channels."""
        if isinstance(values, float):
            return values
        if len(values) != like.shape[1]:
            raise DataError(
                f"codec.scale or codec.shift has {len(values)} numbers, and latents have "
                f"{like.shape[1]} channels; give one number for each"
            )
        key = (values, like.device)
        if key not in self._on_device:
            # Kept, because a copy of host numbers would wait for the device in every step.
            planes = torch.tensor(values, dtype=torch.float32, device=like.device)
            self._on_device[key] = planes.view(-1, 1, 1)
        return self._on_device[key]
