"""Describes the latents that a preparation will write."""

from typing import Any

from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.data.shard_index import LatentDescription
from srepa_ds.data.sources.source import SourceLatents
from srepa_ds.errors import DataError
from srepa_ds.preparation.config import LatentsConfig


def described_latents(
    config: LatentsConfig | None,
    codec: LatentCodec | None,
    of_source: SourceLatents | None,
    *,
    image_shape: tuple[int, int, int],
) -> LatentDescription | None:
    """Returns what decides the latents, None if there will be none.

    Raises DataError if the source's latents are not of the codec's shape.
    """
    if of_source is None and (config is None or codec is None):
        return None
    dtype = config.dtype if config else "fp32"
    space = codec.space if codec and codec.identity else of_source.facts if of_source else {}
    scale, shift = _numbers(space.get("scale")), _numbers(space.get("shift"))
    if of_source is None:
        assert config is not None
        assert codec is not None
        return LatentDescription(
            codec=codec.identity,
            values="moments",
            dtype=dtype,
            latent_shape=codec.latent_shape(image_shape),
            mirrored=config.mirrored,
            scale=scale,
            shift=shift,
        )
    if codec is not None and codec.identity:
        expected = codec.latent_shape(image_shape)
        if expected != of_source.latent_shape:
            raise DataError(
                f"the source holds latents of shape {of_source.latent_shape}, but the codec's are "
                f"{expected}; correct image_size or latents.codec"
            )
    return LatentDescription(
        codec=codec.identity if codec and codec.identity else of_source.facts,
        values=of_source.values,
        dtype=dtype,
        latent_shape=of_source.latent_shape,
        mirrored=of_source.mirrored,
        scale=scale,
        shift=shift,
    )


def _numbers(values: Any) -> float | tuple[float, ...] | None:
    return tuple(values) if isinstance(values, list | tuple) else values


def as_codec(facts: dict[str, Any]) -> str | None:
    """Returns the codec that trains on a source's latents, as YAML; None if it does not say so."""
    if not {"scale", "shift"} <= facts.keys():
        return None
    return f"codec:\n  kind: stored\n  scale: {facts['scale']}\n  shift: {facts['shift']}"
