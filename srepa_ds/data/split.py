"""Splits a source into training and held-out samples, class by class."""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from srepa_ds.noise import NoiseStream, bits

# No epoch has this number, so the split shares no draw with the order of training.
_SPLIT_DRAW = (1 << 24) - 1


@dataclass(frozen=True)
class Split:
    """Indices of a source in two disjoint parts, each in rising order."""

    train: Int64[Tensor, " train"]
    heldout: Int64[Tensor, " heldout"]


def stratified_split(
    labels: Int64[Tensor, " samples"], *, holdout_fraction: float, seed: int
) -> Split:
    """Returns a split that holds out the same fraction of every class.

    Of a class with n samples, round(n x fraction) are held out: the first in an order that is a
    function of seed and sample index alone.
    """
    keys = bits(seed, NoiseStream.DATA_ORDER, torch.arange(len(labels)), 1, draw=_SPLIT_DRAW)[:, 0]
    is_heldout = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        shuffled = members[keys[members].argsort(stable=True)]
        is_heldout[shuffled[: round(len(members) * holdout_fraction)]] = True
    return Split(train=(~is_heldout).nonzero()[:, 0], heldout=is_heldout.nonzero()[:, 0])
