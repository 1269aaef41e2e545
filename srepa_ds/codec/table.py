"""The table of codecs: `LATENT_CODECS`, a row for each."""

from collections.abc import Callable

import torch

from srepa_ds.codec.config import CodecConfig
from srepa_ds.codec.identity import IdentityCodec
from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.codec.stored import StoredCodec
from srepa_ds.codec.vae import open_vae

LATENT_CODECS: dict[str, Callable[[CodecConfig, torch.device], LatentCodec]] = {
    "identity": lambda config, device: IdentityCodec(),
    "vae": open_vae,
    "stored": lambda config, device: StoredCodec(config.scale, config.shift),
}


def build_codec(config: CodecConfig, *, device: torch.device | str = "cpu") -> LatentCodec:
    """Returns the codec that `config` names, working on `device`.

    Raises DataError if its weights are missing or damaged.
    """
    return LATENT_CODECS[config.kind](config, torch.device(device))
