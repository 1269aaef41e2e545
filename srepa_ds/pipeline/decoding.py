"""From latents to pixels, with the VAE of a pipeline or, for models of pixels, without one."""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from srepa_ds.codec.config import CodecConfig, PerChannel
from srepa_ds.codec.latent_codec import Rounding
from srepa_ds.codec.posterior import Affine
from srepa_ds.codec.quantised import quantised

_COLOURS = 3
_IMAGES_AT_ONCE: int = CodecConfig.model_fields["batch_size"].default
"""As the codec `vae` decodes; kernels round otherwise for other numbers of images."""


def decoded(
    latents: Float[Tensor, "batch channels h w"],
    vae: Any,
    *,
    scale: PerChannel | None,
    shift: PerChannel | None,
    rounding: Rounding,
) -> UInt8[Tensor, "batch H W 3"]:
    """Returns the images of latents; without a VAE they are the pixels, in [-1, 1].

    The VAE's own scale and shift are used where None is given. Raises ValueError for latents that
    need a VAE.
    """
    if vae is None:
        if latents.shape[1] != _COLOURS:
            raise ValueError(
                f"latents of {latents.shape[1]} channels need a VAE to become images; give "
                "vae=... to from_pretrained, put its folder beside transformer/, or ask for "
                "output_type='latent'"
            )
        return quantised(latents.float(), rounding)
    scale = float(vae.config.scaling_factor) if scale is None else scale
    shift = float(vae.config.get("shift_factor") or 0.0) if shift is None else shift
    affine = Affine(scale, shift)
    images = []
    for part in latents.float().split(_IMAGES_AT_ONCE):
        z = affine.inverse(part).to(vae.dtype)
        images.append(quantised(vae.decode(z).sample, rounding))
    return torch.cat(images)
