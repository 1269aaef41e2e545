"""The codecs by name, a row each."""

from typing import Annotated

from srepa_ds.codec.identity import IdentityCodec
from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.schema import Section, known_in

LATENT_CODECS: dict[str, type[LatentCodec]] = {"identity": IdentityCodec}


class CodecConfig(Section):
    """The space the diffusion model works in."""

    kind: Annotated[str, known_in("codec", LATENT_CODECS)] = "identity"
    """`identity`: pixels scaled to [-1, 1]."""


def build_codec(config: CodecConfig) -> LatentCodec:
    """Returns the codec `config` asks for."""
    return LATENT_CODECS[config.kind]()
