"""SiT: the diffusion transformer, with taps on its residual stream.

Module names are those of the official code: they are a file format. The model knows nothing of
alignment and draws no random numbers in `forward`.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from srepa_ds.model.activation_checkpointing import (
    ActivationCheckpointingConfig,
    Kept,
    offloaded,
    run_block,
)
from srepa_ds.model.attention import Attention
from srepa_ds.model.attention_backends import (
    bypasses_torch_operators,
    choose_backend,
    runs_everywhere,
)
from srepa_ds.model.blocks import FinalLayer, ResidualStreamLayerNorm, SiTBlock
from srepa_ds.model.embeddings import (
    LabelEmbedding,
    PatchEmbedding,
    TimestepEmbedding,
    conditioning_vector,
    position_embedding,
)
from srepa_ds.model.initialisation import initialise
from srepa_ds.model.variants import SiTConfig

_LOG = logging.getLogger("srepa_ds")
_RECOMPUTED_ATTENTION = (
    "engine.activation_checkpointing 'selective' cannot keep the outputs of attention '%s', which "
    "is not an operator of torch: the backward pass recomputes it; model.attention 'sdpa' can be "
    "kept"
)


class SiTOutput(NamedTuple):
    """The predicted velocity (b, c, h, w) in float32 or wider, and the requested hidden states.

    Each hidden state (b, n, d) is the residual stream after a block, before any norm. With a class
    token it has n + 1 tokens, the class token first; `cls_velocity` (b, class_token_width) is that
    token's velocity.
    """

    velocity: Tensor
    hidden: tuple[Tensor, ...]
    cls_velocity: Tensor | None = None


def unpatchify(
    patches: Float[Tensor, "batch tokens pixels"], *, grid: tuple[int, int], patch_size: int
) -> Float[Tensor, "batch channels height width"]:
    """Returns latents from their patches, which come row by row, each with channels last."""
    rows, columns = grid
    pixels = patches.reshape(len(patches), rows, columns, patch_size, patch_size, -1)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(
        len(patches), -1, rows * patch_size, columns * patch_size
    )


def fixed_position_embedding(config: SiTConfig) -> Float[Tensor, "1 tokens hidden"]:
    """Returns the `pos_embed` of a model in float32: not trained, a function of its sizes."""
    return position_embedding(
        config.grid, config.shape.hidden_size, num_prefix_tokens=config.num_prefix_tokens
    )


def _class_token(width: int | None) -> str:
    return "no class token" if width is None else f"a class token of width {width}"


class SiT(nn.Module):
    """The diffusion transformer of Ma et al., "SiT" (2024), as the REPA code lays it out.

    With `class_token_width` a teacher's noised class token goes through it with the patches, as in
    REG (Wu et al., "Representation entanglement for generation", 2025).
    """

    pos_embed: Tensor
    _kept: tuple[Kept, ...]
    _attention_for: tuple[torch.device, torch.dtype] | None

    def __init__(self, config: SiTConfig, generator: torch.Generator | None = None):
        """Builds the model on the current default device.

        `generator` (of the CPU) draws the weights; without it they are zeros, to be loaded.
        """
        super().__init__()
        self.config = config
        # Plain values: torch.compile does not trace a configuration's properties.
        self.latent_shape, self.grid = config.latent_shape, config.grid
        self.patch_size = config.shape.patch_size
        self.class_token_width = config.class_token_width
        self._attention_for = None
        self._attention_is_settled = runs_everywhere(config.attention)
        self._run_block = run_block
        self.set_activation_checkpointing(ActivationCheckpointingConfig())
        depth, hidden_size, _, patch_size = config.shape
        device = torch.get_default_device()
        # torch fills new layers from its global generator; on "meta" it draws nothing.
        with torch.device("meta"):
            self.x_embedder = PatchEmbedding(config.in_channels, hidden_size, patch_size=patch_size)
            self.t_embedder = TimestepEmbedding(hidden_size)
            self.y_embedder = LabelEmbedding(config.num_classes, hidden_size)
            self.blocks = nn.ModuleList(SiTBlock(config) for _ in range(depth))
            self.final_layer = FinalLayer(
                hidden_size,
                patch_size=patch_size,
                out_channels=config.in_channels,
                class_token_width=config.class_token_width,
            )
            # After the final layer, as in REG's state_dict; None adds nothing to a plain model's.
            width = config.class_token_width
            self.cls_projectors2 = None if width is None else nn.Linear(width, hidden_size)
            self.wg_norm = None if width is None else ResidualStreamLayerNorm(hidden_size)
        self.to_empty(device=device)
        # A buffer, not a frozen parameter: those are rounded to bfloat16 by mixed precision.
        self.register_buffer("pos_embed", fixed_position_embedding(config))
        initialise(self, generator)

    def forward(
        self,
        x_t: Float[Tensor, "batch channels height width"],
        t: Float[Tensor, " batch"],
        labels: Int64[Tensor, " batch"],
        *,
        cls_t: Float[Tensor, "batch class_token_width"] | None = None,
        depths: tuple[int, ...] = (),
    ) -> SiTOutput:
        """Returns the velocity, and the residual stream after each block of `depths` (from 1).

        `cls_t`, the noised class token, is required with a `class_token_width` and refused without.
        Inputs may be of any float dtype. Raises ValueError if `x_t` is not (batch, *latent_shape),
        `cls_t` is missing, superfluous or of another width, or a depth is outside the model.
        """
        self._check(x_t, cls_t, depths)
        weights = self.x_embedder.proj.weight.dtype
        wide = torch.promote_types(weights, torch.float32)
        tokens = self.x_embedder(x_t).to(wide)
        if cls_t is not None:
            assert self.cls_projectors2 is not None
            assert self.wg_norm is not None
            cls_token = self.wg_norm(self.cls_projectors2(cls_t.to(weights)).to(wide))
            tokens = torch.cat((cls_token[:, None], tokens), dim=1)
        residual_stream = tokens + self.pos_embed.to(wide)
        vector = conditioning_vector(self.t_embedder(t), self.y_embedder(labels))
        conditioning = vector.to(weights)
        if not self._attention_is_settled:
            self._settle_attention(x_t.device, weights)
        taps: dict[int, Tensor] = {}
        for number, (block, kept) in enumerate(zip(self.blocks, self._kept, strict=True), start=1):
            is_offloaded = self._offload and kept != "everything"
            with offloaded(residual_stream) if is_offloaded else nullcontext():
                residual_stream = self._run_block(block, residual_stream, conditioning, kept=kept)
            if number in depths:
                taps[number] = residual_stream
        patches, cls_velocity = self.final_layer(residual_stream, conditioning)
        velocity = unpatchify(patches.to(wide), grid=self.grid, patch_size=self.patch_size)
        hidden = tuple(taps[number] for number in depths)
        return SiTOutput(velocity, hidden, None if cls_velocity is None else cls_velocity.to(wide))

    def set_activation_checkpointing(self, checkpointing: ActivationCheckpointingConfig) -> None:
        """Sets what blocks keep for the backward pass; weights and their names stay the same."""
        # Plain values, as above.
        self._kept = tuple(checkpointing.kept_by(n) for n in range(1, self.config.shape.depth + 1))
        self._offload = checkpointing.offload
        self._keeps_attention = checkpointing.policy == "selective"

    def compile_blocks(self, *, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compiles one graph that all blocks share, activation checkpointing included.

        torch.compile makes it at the first forward pass, one for each shape and dtype. Weights keep
        their names.
        """
        self._run_block = torch.compile(run_block, fullgraph=True, backend=backend)

    def choose_attention(self, *, device: torch.device, dtype: torch.dtype) -> str:
        """Sets the attention backend for products in `dtype` on `device`, and returns its name.

        The first forward pass would choose too; an earlier call reports a missing package sooner.
        Raises ConfigError that says what is missing. Warns if blocks are to keep outputs of
        attention that bypass torch's operators.
        """
        head_dim = self.config.head_dim
        backend = choose_backend(
            self.config.attention, device=device, head_dim=head_dim, dtype=dtype
        )
        if self._keeps_attention and bypasses_torch_operators(
            backend, device=device, head_dim=head_dim, dtype=dtype
        ):
            _LOG.warning(_RECOMPUTED_ATTENTION, backend)
        for module in self.blocks.modules():
            if isinstance(module, Attention):
                module.use(backend)
        self._attention_for = (device, dtype)
        return backend

    def _settle_attention(self, device: torch.device, dtype: torch.dtype) -> None:
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        if self._attention_for != (device, dtype):
            self.choose_attention(device=device, dtype=dtype)

    def _check(self, x_t: Tensor, cls_t: Tensor | None, depths: tuple[int, ...]) -> None:
        if tuple(x_t.shape[1:]) != self.latent_shape:
            raise ValueError(
                f"the model takes latents of (channels, height, width) "
                f"{self.latent_shape}, got {tuple(x_t.shape[1:])}"
            )
        width = None if cls_t is None else cls_t.shape[-1]
        if width != self.class_token_width:
            raise ValueError(
                f"the model takes {_class_token(self.class_token_width)}, got {_class_token(width)}"
            )
        unknown = [depth for depth in depths if not 1 <= depth <= len(self.blocks)]
        if unknown:
            raise ValueError(
                f"depths {unknown} are outside the model; its blocks are 1 to {len(self.blocks)}"
            )
