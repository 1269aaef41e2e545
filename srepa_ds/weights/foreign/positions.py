"""The position embedding in a file: not a weight here, but computed, so it must be the same one."""

import math
from collections.abc import Mapping
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from srepa_ds.errors import CheckpointError
from srepa_ds.model.embeddings import position_embedding

NAME = "pos_embed"
# REPA's trainer averages this constant too, which rounds it a little at each step.
_LARGEST_DRIFT = 1e-2


def check_own_positions(weights: Mapping[str, Tensor], path: Path) -> None:
    """Checks the table among `weights` against SiT's of its size, if that is of a square grid.

    Raises CheckpointError for another one, such as a trained one.
    """
    table = weights.get(NAME)
    if table is None or table.ndim != 3 or table.shape[2] % 4:
        return
    num_prefix = int("cls_projectors2.weight" in weights)
    side = math.isqrt(max(table.shape[1] - num_prefix, 0))
    if table.shape[0] == 1 and side and side**2 + num_prefix == table.shape[1]:
        own = position_embedding((side, side), table.shape[2], num_prefix_tokens=num_prefix)
        refuse_others(table, own, path)


def refuse_others(
    there: Float[Tensor, "1 tokens width"], own: Float[Tensor, "1 tokens width"], path: Path
) -> None:
    """Raises CheckpointError about `path` unless both tables are the same, up to rounding."""
    distance = (there.float() - own).abs().max().item()
    if not distance <= _LARGEST_DRIFT:
        raise CheckpointError(
            f"{path}: its pos_embed is not SiT's sines and cosines (they differ by up to "
            f"{distance:.3g}); such a model cannot go on here"
        )
