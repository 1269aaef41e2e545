"""The settings of `srepa-ds prepare`."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from srepa_ds.codec.config import CodecConfig
from srepa_ds.data.pixels import BYTES_PER_VALUE
from srepa_ds.data.shard_index import PixelStorage
from srepa_ds.data.sources.table import SourceConfig
from srepa_ds.schema import Section

_SHARD_BYTES = 1e9


class LatentsConfig(Section):
    """The latents of the images, computed once."""

    codec: CodecConfig
    """The VAE that encodes them. A source that holds latents is only compared with it."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """How means and standard deviations are stored; fp16 rounds them by 0.05 %, and numbers below
    6e-5 by 3e-8."""
    batch_size: int = Field(default=32, ge=1)
    """Images encoded at once. It decides the last bits, so no batch crosses a shard."""
    mirrored: bool = False
    """Whether the mirrored images are encoded too, for `data.mirror`; twice the time and space."""


class PrepareConfig(Section):
    """A source of images, and the data set of shards made of it."""

    kind: Literal["prepare"]
    """Tells this file from other configurations."""
    source: SourceConfig
    """The source of the images."""
    image_size: int = Field(ge=1, le=8192)
    """Side of the square images, cut by ADM's centre crop; smaller images are enlarged."""
    output: Path
    """Folder that receives `train/` and `heldout/`."""
    holdout_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Fraction of every class that is held out; 0 writes no `heldout/`."""
    pixels: PixelStorage | None = "webp"
    """How images are stored, all without loss. `webp`: 45 % of `raw` for photographs, 1.2 ms to
    decode at 256 px; `png`: 57 %, 2 ms; `raw`: no decoding, for small images. null stores none,
    only latents, to train without a teacher."""
    latents: LatentsConfig | None = None
    """The latents to compute; null for training in pixel space, or for encoding while training."""
    samples_per_shard: int | None = Field(default=None, ge=1)
    """Source images per shard; without it as many as take about 1 GB."""
    on_error: Literal["fail", "skip"] = "fail"
    """What an image that cannot be read does: end the preparation, or be listed in
    `skipped.jsonl` and left out."""
    threads: int | None = Field(default=None, ge=1)
    """Images that each rank decodes at once; without it, the machine's cores shared by its
    ranks."""
    seed: int = Field(default=0, ge=0, lt=1 << 64)
    """Decides which images are held out."""

    @property
    def images_per_shard(self) -> int:
        """Source images per shard."""
        if self.samples_per_shard is not None:
            return self.samples_per_shard
        image_bytes = 3 * self.image_size**2 * BYTES_PER_VALUE[self.pixels or "raw"]
        return max(1, int(_SHARD_BYTES / image_bytes))

    def threads_for(self, ranks_here: int) -> int:
        """Returns the threads of each of `ranks_here` ranks on this machine."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) // ranks_here)
