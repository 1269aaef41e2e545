"""The FLOPs of a SiT in closed form, for its utilisation of a device."""

from srepa_ds.model.embeddings import SINUSOID_WIDTH
from srepa_ds.model.variants import MLP_RATIO, SiTConfig


def forward_flops(config: SiTConfig) -> int:
    """Returns the floating-point operations of one image's forward pass.

    Only matrix products count, a multiplication and its addition as two; elementwise operations are
    left out, as in every published utilisation. A backward pass takes twice as many.
    """
    depth, width, _, patch_size = config.shape
    pixels = patch_size * patch_size * config.in_channels
    block = linear_flops_of_block(config) + attention_flops_of_block(config)
    patches = 2 * config.num_tokens * pixels * width
    time = SINUSOID_WIDTH * width + width * width
    final = 2 * width * width
    cls = 2 * (config.class_token_width or 0) * width
    return depth * block + 2 * (patches + time + final + cls)


def linear_flops_of_block(config: SiTConfig) -> int:
    """Returns the operations of the linear maps in one block's forward pass, for one image."""
    width = config.shape.hidden_size
    tokens = config.num_tokens + config.num_prefix_tokens
    return 2 * ((4 + 2 * MLP_RATIO) * tokens + 6) * width * width


def attention_flops_of_block(config: SiTConfig) -> int:
    """Returns the operations of both attention products in one block's forward pass."""
    tokens = config.num_tokens + config.num_prefix_tokens
    return 4 * tokens * tokens * config.shape.hidden_size


def training_flops(config: SiTConfig) -> int:
    """Returns the operations of one image's forward and backward pass, without recomputation."""
    return 3 * forward_flops(config)
