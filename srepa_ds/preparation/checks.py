"""Checks of settings against the source, before anything is written."""

from srepa_ds.data.sources.source import Source
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.preparation.config import PrepareConfig


def check_latents_can_be_made(config: PrepareConfig, source: Source) -> None:
    """Checks that the shards will hold something, and that there is an encoder for latents.

    Raises ConfigError.
    """
    if source.latents is not None:
        return
    faults = []
    if config.pixels is None:
        reason = (
            f"the source '{config.source.kind}' holds no latents, and without images there are "
            "none to encode; store them as webp, png or raw"
        )
        faults.append(Fault("pixels", reason))
    if config.latents is not None and config.latents.codec.kind != "vae":
        reason = (
            f"'{config.latents.codec.kind}' encodes no images; choose 'vae', or set latents to "
            "null and train on pixels"
        )
        faults.append(Fault("latents.codec.kind", reason))
    if faults:
        raise ConfigError("prepare", faults)
