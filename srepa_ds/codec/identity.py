"""The codec `identity`: pixels are the latents."""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from srepa_ds.codec.latent_codec import Encodable, Rounding
from srepa_ds.codec.quantised import quantised, refuse_broken_rows
from srepa_ds.errors import DataError


class IdentityCodec:
    """Maps pixels of 0..255 to latents in [-1, 1] and back."""

    reads_moments = False

    @property
    def decoding(self) -> dict[str, Any]:
        """Names the codec; nothing else decides its pixels."""
        return {"kind": "identity"}

    @property
    def space(self) -> dict[str, Any]:
        """Names the codec; nothing else decides its latents."""
        return {"kind": "identity"}

    @property
    def identity(self) -> dict[str, Any]:
        """Names the codec; nothing else decides its latents."""
        return {"kind": "identity"}

    def moments(self, images: UInt8[Tensor, "batch 3 H W"]) -> Float[Tensor, "batch moments h w"]:
        """Raises DataError: pixels need no encoding."""
        raise DataError("the identity codec trains on pixels; set latents to null")

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns `image_shape` itself."""
        return image_shape

    def encode(self, batch: Encodable, *, seed: int) -> Float[Tensor, "batch c h w"]:
        """Returns x / 127.5 - 1 in fp32; without a posterior, `seed` has no effect.

        Raises DataError if the shards hold no pixels.
        """
        if batch.images is None:
            raise DataError(
                "the identity codec trains on pixels and these shards hold none; "
                "prepare them with images, or choose the codec they were made with"
            )
        return batch.images.to(torch.float32) / 127.5 - 1.0

    def decode(
        self,
        latents: Float[Tensor, "batch 3 h w"],
        *,
        rounding: Rounding = "truncate",
        refuse_broken: bool = False,
    ) -> UInt8[Tensor, "batch h w 3"]:
        """Returns the latents as pixels; raises BrokenImagesError as the protocol says."""
        if refuse_broken:
            refuse_broken_rows(latents, "pixels")
        return quantised(latents, rounding)
