"""The codec `stored`: latents of any origin that the shards hold, without encoder or decoder."""

from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor

from srepa_ds.codec.config import PerChannel
from srepa_ds.codec.latent_codec import Encodable, Rounding
from srepa_ds.codec.posterior import Affine, drawn
from srepa_ds.errors import DataError

_NO_WAY = (
    "the codec 'stored' only reads latents from shards: it can neither encode nor decode images; "
    "train with codec.kind=vae, and the weights they were encoded with, to see images"
)


class StoredCodec:
    """Maps stored latents to the model's space."""

    reads_moments = True

    def __init__(self, scale: PerChannel | None, shift: PerChannel | None):
        self._scale, self._shift = (1.0 if scale is None else scale), shift or 0.0
        self._affine = Affine(self._scale, self._shift)

    @property
    def space(self) -> dict[str, Any]:
        """The scale and shift that are used."""
        return {"kind": "stored", "scale": self._scale, "shift": self._shift}

    @property
    def decoding(self) -> dict[str, Any]:
        """Names the codec, which has no decoder."""
        return {"kind": "stored"}

    @property
    def identity(self) -> dict[str, Any]:
        """Fits latents of any codec, since it does not know which one they are of."""
        return {}

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Raises DataError: only the shards know."""
        raise DataError(_NO_WAY)

    def moments(self, images: UInt8[Tensor, "batch 3 H W"]) -> Float[Tensor, "batch moments h w"]:
        """Raises DataError."""
        raise DataError(_NO_WAY)

    def encode(self, batch: Encodable, *, seed: int) -> Float[Tensor, "batch c h w"]:
        """Returns a draw from each posterior, scaled and shifted, fp32.

        Raises DataError if the shards hold no latents.
        """
        if batch.moments is None:
            raise DataError("the codec 'stored' needs latents, and these shards hold none")
        z = drawn(batch.moments, batch.latent_values, batch.positions, seed=seed)
        return self._affine.forward(z)

    def decode(
        self,
        latents: Float[Tensor, "batch c h w"],
        *,
        rounding: Rounding = "truncate",
        refuse_broken: bool = False,
    ) -> UInt8[Tensor, "batch H W 3"]:
        """Raises DataError."""
        raise DataError(_NO_WAY)
