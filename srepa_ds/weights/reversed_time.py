"""The same model with time in the other direction: REPA's t = 1 is noise, SiT's t = 1 is data."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from srepa_ds.model.embeddings import MAX_PERIOD
from srepa_ds.weights.lazy import LazyTensors, shapes_of

_OF_TIME = "t_embedder.mlp.0.weight"
_OF_VELOCITY = ("final_layer.linear.weight", "final_layer.linear.bias")
CHANGED = (_OF_TIME, *_OF_VELOCITY)
"""The weights that change."""


def reversed_time(weights: Mapping[str, Tensor]) -> LazyTensors:
    """Returns the weights of the model v'(x, t) = -v(x, 1 - t), under the same names.

    It turns SiT's convention into REPA's and back. With f the frequencies of the time embedding,
    cos((1 - t) f) = cos(f) cos(t f) + sin(f) sin(t f), and likewise for the sine, so the first
    layer after it can be rewritten exactly; computed in float64.
    """

    def read(name: str) -> Tensor:
        value = weights[name]
        if name == _OF_TIME:
            return _of_one_minus_t(value)
        return -value if name in _OF_VELOCITY else value

    return LazyTensors(shapes_of(weights), read)


def _of_one_minus_t(weight: Float[Tensor, "width features"]) -> Float[Tensor, "width features"]:
    """Returns the columns that make of the features of t what `weight` makes of those of 1 - t."""
    half = weight.shape[1] // 2
    f = MAX_PERIOD ** (-torch.arange(half, dtype=torch.float64) / half)
    of_cos, of_sin = weight.double().split(half, dim=1)
    columns = (of_cos * f.cos() + of_sin * f.sin(), of_cos * f.sin() - of_sin * f.cos())
    return torch.cat(columns, dim=1).to(weight.dtype)
