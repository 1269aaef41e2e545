"""Trains with a codec that makes some samples' latents infinite, as broken memory would.

Usage: faulty_data.py CONFIG BAD_POSITIONS [OVERRIDES], the positions as "20-60,100-140". Ends with
code 3 and prints the message if training gives up.
"""

import sys
from pathlib import Path

import torch

from srepa_ds.codec.identity import IdentityCodec
from srepa_ds.codec.latent_codec import Encodable
from srepa_ds.codec.table import LATENT_CODECS
from srepa_ds.commands.train import train
from srepa_ds.config.experiment import load_config
from srepa_ds.distributed import ranks
from srepa_ds.errors import DivergedError

SPANS = [tuple(map(int, span.split("-"))) for span in sys.argv[2].split(",")]


class FaultyCodec(IdentityCodec):
    """Pixels as latents, but for the positions of the command line."""

    def encode(self, batch: Encodable, *, seed: int) -> torch.Tensor:
        """Returns infinite latents inside the spans."""
        latents = super().encode(batch, seed=seed)
        for first, end in SPANS:
            inside = (batch.positions >= first) & (batch.positions < end)
            latents[inside] = torch.inf
        return latents


LATENT_CODECS["faulty"] = FaultyCodec
overrides = [*sys.argv[3:], "codec.kind=faulty"]
try:
    assert train(load_config(Path(sys.argv[1]), overrides))
except DivergedError as error:
    if ranks.rank() == 0:
        Path(load_config(Path(sys.argv[1]), overrides).run.folder, "message.txt").write_text(
            str(error)
        )
ranks.leave(0)
