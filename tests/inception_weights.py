"""Random weights for Inception, by a recipe with which the golden features were computed."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from srepa_ds.encoders.inception import build_network
from srepa_ds.files import sha256_of

GOLDEN_SEED = 11


def recipe(seed: int = GOLDEN_SEED) -> dict[str, Tensor]:
    """Returns a state_dict of normal numbers n, drawn tensor by tensor in the order of names."""
    draw = np.random.RandomState(seed).standard_normal
    state = {}
    for name, own in sorted(build_network().state_dict().items()):
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros((), dtype=torch.long)
            continue
        n = draw(own.numel()).reshape(tuple(own.shape))
        state[name] = torch.from_numpy(_scaled(name, n).astype(np.float32))
    return state


def _scaled(name: str, n: np.ndarray) -> np.ndarray:
    kind = name.rpartition(".")[2]
    if kind == "running_var":
        return 0.6 + 0.2 * np.abs(n)
    if kind == "running_mean" or name.endswith("bn.bias"):
        return 0.1 * n
    if name.endswith("bn.weight"):
        return 1 + 0.1 * n
    if name.startswith("fc."):
        return n if kind == "bias" else 0.01 * n
    return n * math.sqrt(1.7 / math.prod(n.shape[1:]))


def write_weights(path: Path, seed: int = GOLDEN_SEED) -> Path:
    """Writes the weights of a seed with torch.save, as the published file, and returns `path`."""
    torch.save(recipe(seed), path)
    return path


def settings_of(path: Path) -> dict[str, str]:
    """Returns the section of an extractor with the weights of a file that is not the published."""
    return {"name": "inception", "weights": str(path), "weights_sha256": sha256_of(path)}
