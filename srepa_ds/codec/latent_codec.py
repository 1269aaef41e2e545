"""The `LatentCodec` protocol: a frozen map between images and the diffusion model's space."""

from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float, UInt8
from torch import Tensor

LatentValues = Literal["moments", "samples"]
"""Mean and standard deviation of a posterior, concatenated over channels, or one draw from it."""

Rounding = Literal["truncate", "round"]
"""From a decoded value to a pixel: towards zero, as REPA and its family do, or to the nearest."""


@runtime_checkable
class Encodable(Protocol):
    """The part of a batch that codecs read."""

    @property
    def images(self) -> Tensor | None:
        """Pixels, uint8 (batch, channels, height, width)."""

    @property
    def moments(self) -> Tensor | None:
        """Stored latents; see `latent_values`."""

    @property
    def latent_values(self) -> LatentValues:
        """Whether `moments` are posteriors or draws from them."""

    @property
    def positions(self) -> Tensor:
        """The global sample counter, int64 (batch)."""


@runtime_checkable
class LatentCodec(Protocol):
    """A frozen map between images and the space the diffusion model works in."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the moments of an image, as plain JSON values.

        Training refuses latents of a codec with another identity.
        """

    @property
    def space(self) -> dict[str, Any]:
        """Everything that decides the latents a model sees, as plain JSON values.

        A training resumes, and its model draws, only with the same.
        """

    @property
    def reads_moments(self) -> bool:
        """Whether `encode` takes stored latents where a batch has them."""

    @property
    def decoding(self) -> dict[str, Any]:
        """Everything that decides the pixels of a latent, as plain JSON values."""

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns (channels, height, width) of the latent of an image of `image_shape`.

        Raises DataError if it cannot be encoded.
        """

    def moments(self, images: UInt8[Tensor, "batch 3 H W"]) -> Float[Tensor, "batch moments h w"]:
        """Returns mean and standard deviation of the posterior of images, concatenated, fp32.

        Raises DataError for a codec without an encoder.
        """

    def encode(self, batch: Encodable, *, seed: int) -> Float[Tensor, "batch c h w"]:
        """Returns clean latents, fp32; `seed` and positions key the draw from a posterior."""

    def decode(
        self,
        latents: Float[Tensor, "batch c h w"],
        *,
        rounding: Rounding = "truncate",
        refuse_broken: bool = False,
    ) -> UInt8[Tensor, "batch H W 3"]:
        """Returns the images of `latents`; raises DataError without a decoder.

        With `refuse_broken`, raises BrokenImagesError for NaN and infinite values, for which the
        host waits for the device; otherwise they become any pixel.
        """
