"""The `LatentCodec` protocol: a frozen map between images and the diffusion model's space."""

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
    """A frozen map between images and the space the diffusion model works in."""

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns (channels, height, width) of the latent of an image of `image_shape`."""

    def encode(self, batch: Encodable, *, seed: int) -> Float[Tensor, "batch c h w"]:
        """Returns clean latents, fp32; `seed` and positions key the draw from a posterior."""

    def decode(self, latents: Float[Tensor, "batch c h w"]) -> UInt8[Tensor, "batch H W 3"]:
        """Returns the images of `latents`."""
