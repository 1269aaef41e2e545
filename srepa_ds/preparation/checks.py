"""Checks that a source holds what the settings of a preparation ask for."""

from collections.abc import Iterator

from srepa_ds.data.sources.source import SourceLatents
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.preparation.config import PrepareConfig


def check_wanted(config: PrepareConfig, of_source: SourceLatents | None) -> None:
    """Checks images and latents against what the source holds; raises ConfigError."""
    if faults := list(_faults(config, of_source)):
        raise ConfigError("prepare", faults)


def _faults(config: PrepareConfig, of_source: SourceLatents | None) -> Iterator[Fault]:
    kind, wanted = config.source.kind, config.latents
    if config.pixels is None and wanted is None and of_source is None:
        reason = "null leaves nothing to store without latents; set latents.codec, or pixels: webp"
        yield Fault("pixels", reason)
    if of_source is not None and not of_source.has_images and config.pixels is not None:
        yield Fault("pixels", f"the source '{kind}' holds latents without images; set pixels: null")
    if wanted is None:
        return
    if wanted.codec.kind == "identity":
        reason = (
            "'identity' has no latents: it trains on pixels; choose 'vae', or set latents: null"
        )
        yield Fault("latents.codec.kind", reason)
    if wanted.codec.kind == "stored" and of_source is None:
        reason = f"'stored' cannot encode, and the source '{kind}' holds no latents; choose 'vae'"
        yield Fault("latents.codec.kind", reason)
    if of_source is not None and wanted.mirrored and not of_source.mirrored:
        reason = (
            f"the source '{kind}' holds no latents of mirrored images; set it to false, or prepare "
            "from the images themselves"
        )
        yield Fault("latents.mirrored", reason)
