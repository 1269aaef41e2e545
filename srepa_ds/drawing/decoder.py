"""Which VAE decodes the images of a set, and what it is called."""

from srepa_ds.codec.config import CodecConfig
from srepa_ds.config.experiment import Config
from srepa_ds.encoders.published import local_folder
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.schema import replaced
from srepa_ds.weights.exported import ExportedModel


def as_drawn(config: Config, model: ExportedModel) -> CodecConfig:
    """Returns the codec that `model` was trained with, with the decoder that `config` names.

    Raises ConfigError for `sample.decoder` if the codec is no VAE.
    """
    codec = model.document.section(CodecConfig, "codec").as_used_here(config.codec)
    decoder = config.sample.decoder
    if decoder is None:
        return codec
    if codec.kind != "vae":
        reason = f"decodes latents of a VAE, and the model's codec is '{codec.kind}'; set null"
        raise ConfigError("configuration", [Fault("sample.decoder", reason)])
    return replaced(codec, weights=decoder)


def check_decoder(config: Config) -> None:
    """Raises DataError that names `sample.decoder` if there is no such VAE on this machine."""
    if config.sample.decoder is not None:
        local_folder(config.sample.decoder, setting="sample.decoder")


def decoder_name(codec: CodecConfig) -> str | None:
    """Returns the name of the VAE: of its repository, or of its folder without the place."""
    if codec.weights is None:
        return None
    return codec.weights.absolute().name if codec.weights.is_dir() else str(codec.weights)
