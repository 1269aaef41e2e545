"""The table of codecs: `LATENT_CODECS`, a row for each, and the section that chooses one."""

from typing import Annotated

from srepa_ds.codec.identity import IdentityCodec
from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.schema import Section, one_of

LATENT_CODECS: dict[str, type[LatentCodec]] = {"identity": IdentityCodec}


class CodecConfig(Section):
    """The space the diffusion model works in."""

    kind: Annotated[str, one_of("codec", LATENT_CODECS)] = "identity"
    """`identity`: pixels scaled to [-1, 1]."""


def build_codec(config: CodecConfig) -> LatentCodec:
    """Returns the codec that `config` names."""
    return LATENT_CODECS[config.kind]()
