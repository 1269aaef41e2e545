"""From a batch to the clean latent that is noised, and from a latent back to pixels."""

from typing import Annotated, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from srepa_ds.errors import DataError
from srepa_ds.schema import Section, known_in


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


class IdentityCodec:
    """Pixels as latents: [-1, 1] instead of 0..255."""

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns `image_shape` itself."""
        return image_shape

    def encode(self, batch: Encodable, *, seed: int) -> Float[Tensor, "batch c h w"]:
        """Returns x / 127.5 - 1 in fp32; there is no posterior, so `seed` changes nothing.

        Raises DataError if the shards hold no pixels.
        """
        if batch.images is None:
            raise DataError(
                "the identity codec trains on pixels and these shards hold none; "
                "prepare them with images, or choose the codec they were made with"
            )
        return batch.images.to(torch.float32) / 127.5 - 1.0

    def decode(self, latents: Float[Tensor, "batch 3 h w"]) -> UInt8[Tensor, "batch h w 3"]:
        """Returns 255 (x + 1) / 2 clamped to 0..255 and truncated, as REPA's generate does."""
        pixels = 255.0 * ((latents.to(torch.float32) + 1.0) / 2.0)
        return pixels.clamp(0.0, 255.0).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


LATENT_CODECS: dict[str, type[LatentCodec]] = {"identity": IdentityCodec}


class CodecConfig(Section):
    """The space the diffusion model works in."""

    kind: Annotated[str, known_in("codec", LATENT_CODECS)] = "identity"
    """`identity`: pixels scaled to [-1, 1]."""


def build_codec(config: CodecConfig) -> LatentCodec:
    """Returns the codec `config` asks for."""
    return LATENT_CODECS[config.kind]()
