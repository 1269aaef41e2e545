"""Initialises the weights of a SiT."""

import math

import torch
from torch import Tensor, nn

_EMBEDDING_STD = 0.02


def initialise(model: nn.Module, generator: torch.Generator | None) -> None:
    """Fills the weights of a SiT from `generator`, a CPU generator, in the order of their names.

    Xavier-uniform for linear maps (the fused qkv as one matrix, a patch as one row), N(0, 0.02) for
    the time and label embeddings, zero for biases, adaLN and the final layer, so that every block
    starts as the identity (Peebles and Xie, DiT). Draws are in float32 on the CPU, so the weights
    do not depend on device or rank. Without a generator they are zero.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            _fill(module.weight, name, generator)
            if not isinstance(module, nn.Embedding) and module.bias is not None:
                nn.init.zeros_(module.bias)


@torch.no_grad()
def _fill(weight: Tensor, name: str, generator: torch.Generator | None) -> None:
    if weight.is_meta:
        return
    starts_at_zero = "adaLN_modulation" in name or name.startswith("final_layer.")
    if generator is None or starts_at_zero:
        weight.zero_()
        return
    drawn = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    if name.startswith(("t_embedder.", "y_embedder.")):
        drawn.normal_(0.0, _EMBEDDING_STD, generator=generator)
    else:
        fan_out, fan_in = weight.shape[0], math.prod(weight.shape[1:])
        bound = math.sqrt(6.0 / (fan_in + fan_out))
        drawn.uniform_(-bound, bound, generator=generator)
    weight.copy_(drawn)
