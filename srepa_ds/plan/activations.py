"""Activation memory and recomputation in closed form, for each activation-checkpointing policy.

`tools/activation_memory.py` counts both on the real model.
"""

from typing import Literal, NamedTuple

from srepa_ds.model.activation_checkpointing import (
    ActivationCheckpointingConfig,
    Kept,
)
from srepa_ds.model.flops import attention_flops_of_block, linear_flops_of_block
from srepa_ds.model.precision import PRECISIONS, Precision
from srepa_ds.model.variants import MLP_RATIO, SiTConfig

_RESIDUAL_STREAM_BYTES = 4


class ActivationBytes(NamedTuple):
    """Bytes that a forward pass keeps for the backward pass, without weights and their copies."""

    device: int
    host: int
    """Offloaded."""
    transient: int
    """On the device in addition, while the backward pass recomputes one block."""


def activation_bytes(
    config: SiTConfig,
    *,
    batch: int,
    precision: Precision,
    checkpointing: ActivationCheckpointingConfig | None = None,
    device_type: Literal["cpu", "cuda"] = "cuda",
) -> ActivationBytes:
    """Returns the bytes of activations that the graph of one SiT forward pass keeps.

    Holds for attention that keeps its output and the log-sum-exp of the softmax (flash,
    memory-efficient; on the CPU too), not for `math`, and for blocks run without torch.compile.
    bfloat16 copies of weights under autocast are not counted.
    """
    checkpointing = checkpointing or ActivationCheckpointingConfig()
    sizes = _Sizes.of(config, precision, device_type)
    kept = [checkpointing.kept_by(number) for number in range(1, config.shape.depth + 1)]
    # Each block's output is the input of the next; the last one's, of the final layer.
    is_offloaded = [checkpointing.offload and one != "everything" for one in kept]
    inputs = [sizes.residual_stream if moved else 0 for moved in is_offloaded]
    inside = [_block_bytes(sizes, one) + sizes.residual_stream for one in kept]
    ends = sizes.residual_stream + _ends_bytes(config, sizes)
    again = [_block_bytes(sizes, "everything") - _block_bytes(sizes, one) for one in kept]
    # An offloaded input returns to the device for its block.
    transient = [one + back for one, back in zip(again, inputs, strict=True)]
    return ActivationBytes(
        device=batch * (ends + sum(inside) - sum(inputs)),
        host=batch * sum(inputs),
        transient=batch * max(transient),
    )


class _Sizes(NamedTuple):
    """Bytes per image."""

    residual_stream: int
    """Tokens in the dtype of the residual stream."""
    tokens: int
    """Tokens in the dtype of the products."""
    gated: int
    """The output of a branch in the dtype that the gated sum keeps."""
    per_token: int
    """One float32 number per token."""
    log_sums: int
    """The log-sum-exp of attention's softmax."""
    normed_heads: int
    """Kept by the norms of queries and keys."""
    modulation: int
    """Shifts, scales and gates in the dtype of the residual stream."""
    modulation_product: int
    """The same in the dtype of the products."""

    @classmethod
    def of(cls, config: SiTConfig, precision: Precision, device_type: str) -> "_Sizes":
        width = PRECISIONS[precision].products.itemsize
        tokens = config.num_tokens + config.num_prefix_tokens
        hidden, heads = config.shape.hidden_size, config.shape.num_heads
        # CUDA's autocast widens all operands of the gated sum, the CPU's does not.
        widened = PRECISIONS[precision].is_autocast and device_type == "cuda"
        return cls(
            residual_stream=_RESIDUAL_STREAM_BYTES * tokens * hidden,
            tokens=width * tokens * hidden,
            gated=(4 if widened else width) * tokens * hidden,
            per_token=4 * tokens,
            log_sums=4 * tokens * heads,
            normed_heads=(
                _normed_heads_bytes(config, width, widened=widened) if config.qk_norm else 0
            ),
            modulation=6 * _RESIDUAL_STREAM_BYTES * hidden,
            modulation_product=6 * width * hidden,
        )


def _normed_heads_bytes(config: SiTConfig, width: int, *, widened: bool) -> int:
    tokens = config.num_tokens + config.num_prefix_tokens
    hidden, heads = config.shape.hidden_size, config.shape.num_heads
    statistics = 2 * 2 * 4 * tokens * heads
    # The normalised queries and keys, and a second copy of attention's output: it has their layout,
    # not the layout that the projection needs. CUDA's autocast normalises in float32.
    numbers = 3 * width + (2 * 4 if widened else 0)
    return statistics + numbers * tokens * hidden


def _block_bytes(sizes: _Sizes, kept: Kept) -> int:
    """Returns the bytes that a block keeps in addition to its input and its output."""
    attention = sizes.tokens + sizes.log_sums
    if kept == "nothing":
        return 0
    if kept == "attention":
        return attention
    qkv, hidden = 3 * sizes.tokens, MLP_RATIO * sizes.tokens
    if kept == "products":
        return attention + qkv + hidden + 2 * sizes.tokens + sizes.modulation_product
    # Twice: the norm's output and statistics, 1 + scale, the modulated tokens, a branch's output.
    norms = 2 * (sizes.residual_stream + 2 * sizes.per_token + sizes.modulation // 6 + sizes.tokens)
    middle = sizes.residual_stream
    perceptron = 2 * hidden
    branches = norms + 2 * sizes.gated + middle
    return branches + qkv + sizes.normed_heads + attention + perceptron + sizes.modulation


def _ends_bytes(config: SiTConfig, sizes: _Sizes) -> int:
    """Returns the bytes kept outside the blocks, without residual streams."""
    norm = sizes.residual_stream + 2 * sizes.per_token + sizes.tokens
    channels, height, width = config.latent_shape
    return norm + 4 * channels * height * width


def recompute_flops(
    config: SiTConfig, *, batch: int, checkpointing: ActivationCheckpointingConfig
) -> int:
    """Returns the FLOPs of matrix products that one backward pass recomputes.

    A multiplication and its addition count as two.
    """
    blocks = range(1, config.shape.depth + 1)
    return batch * sum(_repeated_flops(config, checkpointing.kept_by(number)) for number in blocks)


def _repeated_flops(config: SiTConfig, kept: Kept) -> int:
    linear = linear_flops_of_block(config)
    repeated = {"everything": 0, "products": 0, "attention": linear}
    return repeated.get(kept, linear + attention_flops_of_block(config))
