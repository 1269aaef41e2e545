"""SiT: the diffusion transformer, with taps on its residual stream.

Module names are those of the official code: they are a file format. The model knows nothing of
alignment and draws no random number in `forward`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from srepa_ds.model.blocks import FinalLayer, SiTBlock
from srepa_ds.model.embeddings import (
    LabelEmbedding,
    PatchEmbedding,
    TimestepEmbedding,
    conditioning,
    position_embedding,
)
from srepa_ds.model.initialisation import initialise
from srepa_ds.model.variants import SiTConfig


class SiTOutput(NamedTuple):
    """The predicted velocity (b, c, h, w) in float32 or wider, and the hidden states asked for.

    Each hidden state (b, n, d) is the residual stream after a block, before any norm.
    """

    velocity: Tensor
    hidden: tuple[Tensor, ...]


def unpatchify(
    patches: Float[Tensor, "batch tokens pixels"], *, grid: tuple[int, int], patch_size: int
) -> Float[Tensor, "batch channels height width"]:
    """Returns the latents whose patches, row by row, are given pixel by pixel, channels last."""
    rows, columns = grid
    pixels = patches.reshape(len(patches), rows, columns, patch_size, patch_size, -1)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(
        len(patches), -1, rows * patch_size, columns * patch_size
    )


class SiT(nn.Module):
    """The diffusion transformer of Ma et al., "SiT" (2024), as the REPA code lays it out."""

    pos_embed: Tensor

    def __init__(self, config: SiTConfig, generator: torch.Generator | None = None):
        """Builds the model on the current default device.

        `generator` (of the CPU) draws the weights; without one they are zeros, to be loaded.
        """
        super().__init__()
        self.config = config
        # Plain values: torch.compile does not trace a configuration's properties.
        self.latent_shape, self.grid = config.latent_shape, config.grid
        self.patch_size = config.shape.patch_size
        depth, hidden_size, _, patch_size = config.shape
        device = torch.get_default_device()
        # torch fills new layers from its global generator; on "meta" it draws nothing.
        with torch.device("meta"):
            self.x_embedder = PatchEmbedding(config.in_channels, hidden_size, patch_size=patch_size)
            self.t_embedder = TimestepEmbedding(hidden_size)
            self.y_embedder = LabelEmbedding(config.num_classes, hidden_size)
            self.blocks = nn.ModuleList(SiTBlock(config) for _ in range(depth))
            self.final_layer = FinalLayer(
                hidden_size, patch_size=patch_size, out_channels=config.in_channels
            )
        self.to_empty(device=device)
        # A buffer, not a frozen parameter: those are rounded to bfloat16 by mixed precision.
        self.register_buffer("pos_embed", position_embedding(config.grid, hidden_size))
        initialise(self, generator)

    def forward(
        self,
        x_t: Float[Tensor, "batch channels height width"],
        t: Float[Tensor, "batch"],
        labels: Int64[Tensor, "batch"],
        *,
        depths: tuple[int, ...] = (),
    ) -> SiTOutput:
        """Returns the velocity, and the residual stream after each block of `depths` (from 1).

        Inputs may be of any float dtype. Raises ValueError if `x_t` is not (batch, *latent_shape)
        or a depth lies outside the model.
        """
        self._check(x_t, depths)
        weights = self.x_embedder.proj.weight.dtype
        tokens = self.x_embedder(x_t)
        wide = torch.promote_types(weights, torch.float32)
        stream = tokens.to(wide) + self.pos_embed.to(wide)
        activated = conditioning(self.t_embedder(t), self.y_embedder(labels)).to(weights)
        taps: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks, start=1):
            stream = block(stream, activated)
            if number in depths:
                taps[number] = stream
        patches = self.final_layer(stream, activated).to(wide)
        velocity = unpatchify(patches, grid=self.grid, patch_size=self.patch_size)
        return SiTOutput(velocity, tuple(taps[number] for number in depths))

    def _check(self, x_t: Tensor, depths: tuple[int, ...]) -> None:
        if tuple(x_t.shape[1:]) != self.latent_shape:
            raise ValueError(
                f"the model takes latents of (channels, height, width) "
                f"{self.latent_shape}, got {tuple(x_t.shape[1:])}"
            )
        unknown = [depth for depth in depths if not 1 <= depth <= len(self.blocks)]
        if unknown:
            raise ValueError(
                f"depths {unknown} lie outside the model; its blocks are 1 to {len(self.blocks)}"
            )
