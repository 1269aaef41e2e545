"""Activation memory and recomputation in closed form, for each policy of activation checkpointing.

tools/activation_memory.py counts both on the real model.
"""

from typing import Literal, NamedTuple

from srepa_ds.model.activation_checkpointing import Kept, Precision, RematConfig
from srepa_ds.model.variants import MLP_RATIO, SiTConfig

_STREAM_BYTES = 4


class ActivationBytes(NamedTuple):
    """What a forward pass leaves for the backward pass, without weights and their copies."""

    device: int
    host: int
    """Offloaded."""
    transient: int
    """On the device besides, while the backward pass has one block computed again."""


def activation_bytes(
    config: SiTConfig,
    *,
    batch: int,
    precision: Precision,
    remat: RematConfig | None = None,
    device_type: Literal["cpu", "cuda"] = "cuda",
) -> ActivationBytes:
    """Returns the bytes of activations that the graph of one SiT forward pass keeps.

    Holds for attention that keeps its output and the logarithm of the softmax's denominator
    (flash, memory-efficient; on the CPU too), not for `math`, and for blocks run without
    torch.compile. Weights' bfloat16 copies under autocast are not counted.
    """
    remat = remat or RematConfig()
    sizes = _Sizes.of(config, precision, device_type)
    kept = [remat.kept_by(number) for number in range(1, config.shape.depth + 1)]
    # Each block's output is the next one's input, and the last one's that of the final layer.
    inputs = [sizes.stream if remat.offload and one != "everything" else 0 for one in kept]
    inside = [_block_bytes(sizes, one) + sizes.stream for one in kept]
    ends = sizes.stream + _ends_bytes(config, sizes)
    again = [_block_bytes(sizes, "everything") - _block_bytes(sizes, one) for one in kept]
    # An input that waits elsewhere comes back for its block.
    transient = [one + back for one, back in zip(again, inputs, strict=True)]
    return ActivationBytes(
        device=batch * (ends + sum(inside) - sum(inputs)),
        host=batch * sum(inputs),
        transient=batch * max(transient),
    )


class _Sizes(NamedTuple):
    """Bytes per image."""

    stream: int
    """Tokens in the dtype of the residual stream."""
    tokens: int
    """Tokens in the dtype of the products."""
    gated: int
    """The output of a branch as the gated sum keeps it."""
    per_token: int
    """One float32 number for every token."""
    log_sums: int
    """The logarithms of attention's denominators."""
    normed_heads: int
    """What normalising queries and keys keeps."""
    modulation: int
    """Shifts, scales and gates in the dtype of the stream."""
    modulation_product: int
    """The same in the dtype of the products."""

    @classmethod
    def of(cls, config: SiTConfig, precision: Precision, device_type: str) -> "_Sizes":
        width = 4 if precision == "fp32" else 2
        tokens = config.num_tokens + config.num_prefix_tokens
        hidden, heads = config.shape.hidden_size, config.shape.num_heads
        # CUDA's autocast widens all operands of the gated sum, the CPU's does not.
        widened = precision == "bf16_autocast" and device_type == "cuda"
        return cls(
            stream=_STREAM_BYTES * tokens * hidden,
            tokens=width * tokens * hidden,
            gated=(4 if widened else width) * tokens * hidden,
            per_token=4 * tokens,
            log_sums=4 * tokens * heads,
            normed_heads=(
                _normed_heads_bytes(config, width, widened=widened) if config.qk_norm else 0
            ),
            modulation=6 * _STREAM_BYTES * hidden,
            modulation_product=6 * width * hidden,
        )


def _normed_heads_bytes(config: SiTConfig, width: int, *, widened: bool) -> int:
    tokens = config.num_tokens + config.num_prefix_tokens
    hidden, heads = config.shape.hidden_size, config.shape.num_heads
    statistics = 2 * 2 * 4 * tokens * heads
    # The normalised queries and keys, and attention's output a second time: it has their layout,
    # not that of the projection after it. CUDA's autocast normalises in float32.
    numbers = 3 * width + (2 * 4 if widened else 0)
    return statistics + numbers * tokens * hidden


def _block_bytes(sizes: _Sizes, kept: Kept) -> int:
    """Returns the bytes that a block keeps besides its input and its output."""
    attention = sizes.tokens + sizes.log_sums
    if kept == "nothing":
        return 0
    if kept == "attention":
        return attention
    qkv, hidden = 3 * sizes.tokens, MLP_RATIO * sizes.tokens
    if kept == "products":
        return attention + qkv + hidden + 2 * sizes.tokens + sizes.modulation_product
    # Twice: the norm's output and statistics, 1 + scale, the modulated tokens, a branch's output.
    norms = 2 * (sizes.stream + 2 * sizes.per_token + sizes.modulation // 6 + sizes.tokens)
    middle = sizes.stream
    perceptron = 2 * hidden
    branches = norms + 2 * sizes.gated + middle
    return branches + qkv + sizes.normed_heads + attention + perceptron + sizes.modulation


def _ends_bytes(config: SiTConfig, sizes: _Sizes) -> int:
    """Returns the bytes kept before the first and after the last block, streams not counted."""
    norm = sizes.stream + 2 * sizes.per_token + sizes.tokens
    channels, height, width = config.latent_shape
    return norm + 4 * channels * height * width


def recompute_flops(config: SiTConfig, *, batch: int, remat: RematConfig) -> int:
    """Returns the FLOPs of matrix products in one backward pass that only repeat the forward pass.

    A multiplication and its addition count as two.
    """
    blocks = range(1, config.shape.depth + 1)
    return batch * sum(_repeated_flops(config, remat.kept_by(number)) for number in blocks)


def _repeated_flops(config: SiTConfig, kept: Kept) -> int:
    hidden = config.shape.hidden_size
    tokens = config.num_tokens + config.num_prefix_tokens
    linear = 2 * (4 + 2 * MLP_RATIO) * tokens * hidden**2 + 2 * 6 * hidden**2
    attention = 4 * tokens**2 * hidden
    repeated = {"everything": 0, "products": 0, "attention": linear}
    return repeated.get(kept, linear + attention)
