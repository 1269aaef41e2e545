"""How much arithmetic a SiT does, in closed form: what throughput is measured against."""

from srepa_ds.model.embeddings import SINUSOID_WIDTH
from srepa_ds.model.variants import MLP_RATIO, SiTConfig


def forward_flops(config: SiTConfig) -> int:
    """Returns the floating-point operations of one image's forward pass.

    Matrix products alone, a multiplication and an addition each; what is done element by element is
    left out, as in every published utilisation. A backward pass takes twice as many.
    """
    depth, width, _, patch_size = config.shape
    tokens = config.num_tokens + config.num_prefix_tokens
    pixels = patch_size * patch_size * config.in_channels
    attention = 4 * tokens * width * width + 2 * tokens * tokens * width
    block = attention + 2 * MLP_RATIO * tokens * width * width + 6 * width * width
    patches = 2 * config.num_tokens * pixels * width
    time = SINUSOID_WIDTH * width + width * width
    final = 2 * width * width
    cls = 2 * (config.class_token_width or 0) * width
    return 2 * (depth * block + patches + time + final + cls)


def training_flops(config: SiTConfig) -> int:
    """Returns the operations of one image's forward and backward pass, without recomputation."""
    return 3 * forward_flops(config)
