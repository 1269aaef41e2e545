"""The settings of a codec."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from srepa_ds.schema import MayChange, OnlyFor, Section, may_change, one_of, replaced

CODEC_KINDS = dict.fromkeys(("identity", "vae", "stored"))
PerChannel = float | tuple[float, ...]
"""A number for all channels, or one for each."""


class CodecConfig(Section):
    """The space the diffusion model works in."""

    kind: Annotated[str, one_of("codec", CODEC_KINDS)] = "identity"
    """`identity`: pixels scaled to [-1, 1]. `vae`: the latents of an `AutoencoderKL` of diffusers.
    `stored`: latents of any origin that the shards hold; they cannot be decoded here."""

    weights: Annotated[Path | None, MayChange, OnlyFor("kind", "vae")] = None
    """A local folder as diffusers saves one, or the name of a repository that `srepa-ds fetch` has
    brought: `stabilityai/sd-vae-ft-mse`, `stabilityai/sd-vae-ft-ema`. Latents fit every VAE with
    the same encoder, whatever its decoder."""

    scale: Annotated[PerChannel | None, OnlyFor("kind", ("vae", "stored"))] = None
    """The model's latents are (z - shift) x scale. Without it the VAE's own `scaling_factor`, or 1
    for stored latents."""

    shift: Annotated[PerChannel | None, OnlyFor("kind", ("vae", "stored"))] = None
    """Without it the VAE's own `shift_factor`, or 0."""

    precision: Annotated[Literal["fp32", "tf32", "bf16"], MayChange, OnlyFor("kind", "vae")] = (
        "fp32"
    )
    """The arithmetic of the VAE, whose weights stay float32. Encoding in `bf16` moved the
    means of small VAEs by 2 % of their spread; REPA encodes in fp32."""

    tiled: Annotated[bool, MayChange, OnlyFor("kind", "vae")] = False
    """Whether large images are encoded and decoded in overlapping tiles, which bounds the memory
    but is not exact; for 1024 px and more."""

    batch_size: Annotated[int, MayChange, OnlyFor("kind", "vae")] = Field(default=16, ge=1)
    """Images that are decoded, or encoded in training, at once; it decides the memory."""

    @model_validator(mode="after")
    def _vae_has_weights(self) -> "CodecConfig":
        if self.kind == "vae" and self.weights is None:
            raise ValueError("weights is required for kind 'vae': a folder, or a repository's name")
        return self

    def as_used_here(self, given: "CodecConfig") -> "CodecConfig":
        """Returns this codec, which a model was trained with, with the weights of `given`.

        And with its precision and whatever else may change; if `given` is of another kind, as it
        is. So a model trained on another machine, or to be decoded by another decoder, is drawn
        from by settings of today.
        """
        if given.kind != self.kind:
            return self
        fields = type(self).model_fields
        changes = {name: getattr(given, name) for name in fields if may_change(type(self), name)}
        return replaced(self, **changes)
