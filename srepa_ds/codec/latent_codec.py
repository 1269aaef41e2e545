"""What a latent codec is: a frozen map between images and the space of the diffusion model."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float, UInt8
from torch import Tensor


@runtime_checkable
class Encodable(Protocol):
    """The part of a batch that codecs read."""

    @property
    def images(self) -> Tensor | None:
        """Pixels, uint8 (batch, channels, height, width)."""

    @property
    def moments(self) -> Tensor | None:
        """Mean and standard deviation of a VAE's posterior, concatenated over channels."""

    @property
    def positions(self) -> Tensor:
        """The global sample counter, int64 (batch)."""


@runtime_checkable
class LatentCodec(Protocol):
    """A fixed, frozen map between images and the space the diffusion model works in."""

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns the (channels, height, width) of the latent of such an image."""

    def encode(self, batch: Encodable, *, seed: int) -> Float[Tensor, "batch c h w"]:
        """Returns clean latents, fp32; a posterior draw is keyed by `seed` and positions."""

    def decode(self, latents: Float[Tensor, "batch c h w"]) -> UInt8[Tensor, "batch H W 3"]:
        """Returns the images of `latents`."""
