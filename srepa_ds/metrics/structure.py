"""The spatial structure of an image's tokens: iREPA's LDS, CDS, SRSS and RMSC.

Each takes tokens on a row-major grid and gives one value per image, from the cosine similarities of
tokens and their Manhattan distances on the grid. Source: iREPA's spatial metrics.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

_EPSILON = 1e-8
_REGION_EPSILON = 1e-12
_SLICE_ELEMENTS = 8_000_000
"""Similarities held at once; all those of 32 images of 4,096 tokens would take 2 GB."""


def local_distant_similarity(
    tokens: Float[Tensor, "images tokens width"],
    grid: tuple[int, int],
    *,
    far_distance: int = 6,
) -> Float32[Tensor, " images"]:
    """Returns LDS: the mean similarity of adjacent tokens minus that of distant ones.

    Distant are pairs of at least `far_distance`; without any, their mean counts as 0. NaN for a
    single token.
    """
    sums, counts = _by_distance(tokens, grid)
    # Each edge of the grid counts in both directions, which leaves its mean as it is.
    local = sums[:, 1:2].sum(dim=1) / counts[1:2].sum()
    distant = sums[:, far_distance:].sum(dim=1) / counts[far_distance:].sum().clamp(min=1)
    return (local - distant).float()


def correlation_decay_slope(
    tokens: Float[Tensor, "images tokens width"],
    grid: tuple[int, int],
    *,
    max_distance: int = 8,
) -> Float32[Tensor, " images"]:
    """Returns CDS: by how much the mean similarity falls per unit of distance.

    The negative slope of a least-squares line through the means at distances 1 to `max_distance`,
    as far as the grid has them. NaN for a grid with fewer than two distances.
    """
    sums, counts = _by_distance(tokens, grid)
    means = sums[:, 1 : max_distance + 1] / counts[1 : max_distance + 1]
    distances = torch.arange(1, means.shape[1] + 1, dtype=means.dtype, device=means.device)
    centred = distances - distances.mean()
    return -((means @ centred) / centred.square().sum()).float()


def region_self_similarity(
    tokens: Float[Tensor, "images tokens width"],
    masks: Bool[Tensor, "images tokens"],
    grid: tuple[int, int],
    *,
    near_distances: tuple[int, int] = (1, 1),
    far_distance: int = 6,
) -> Float32[Tensor, " images"]:
    """Returns SRSS: how much more alike foreground tokens are to near ones of their own region.

    Per foreground token, its mean similarity to the foreground at `near_distances` (both included)
    minus that to the background at `far_distance` or more; the mean over tokens that have both.
    NaN for an image without such tokens, with fewer than two of foreground or none of background.
    """
    inside = masks.float()[:, None]
    totals = tokens.new_zeros(len(tokens), dtype=torch.float64)
    counted = torch.zeros_like(totals)
    for part in _similarities(tokens, grid, epsilon=_REGION_EPSILON):
        first, last = near_distances
        near = ((part.distances >= first) & (part.distances <= last)) * inside
        far = (part.distances >= far_distance) * (1 - inside)
        num_near, num_far = near.sum(dim=2), far.sum(dim=2)
        has_both = masks[:, part.rows] & (num_near > 0) & (num_far > 0)
        difference = (part.values * near).sum(dim=2) / num_near
        difference = difference - (part.values * far).sum(dim=2) / num_far
        totals += difference.double().where(has_both, 0).sum(dim=1)
        counted += has_both.sum(dim=1)
    # With near distances from 0 on, a single token would be compared with itself.
    return (totals / counted).where(masks.sum(dim=1) >= 2, torch.nan).float()


def spatial_contrast(
    tokens: Float[Tensor, "images tokens width"], *, takes_root: bool = True
) -> Float32[Tensor, " images"]:
    """Returns RMSC: the root mean square distance of the normalised tokens from their mean.

    Without `takes_root`, its square.
    """
    unit = _normalised(tokens, _EPSILON)
    squares = (unit - unit.mean(dim=1, keepdim=True)).square().sum(dim=2).mean(dim=1)
    return squares.sqrt() if takes_root else squares


class _Similarities(NamedTuple):
    """Of some tokens of each image to all of them."""

    rows: slice
    values: Float32[Tensor, "images rows tokens"]
    distances: Int64[Tensor, "rows tokens"]


def _similarities(
    tokens: Tensor, grid: tuple[int, int], *, epsilon: float
) -> Iterator[_Similarities]:
    """Yields the similarities row by row of the Gram matrices, a few rows at a time."""
    height, width = grid
    number = height * width
    if tokens.shape[1] != number:
        raise ValueError(f"{tokens.shape[1]} tokens do not fill a grid of {height} x {width}")
    unit = _normalised(tokens, epsilon)
    places = torch.arange(number, device=tokens.device)
    y, x = places // width, places % width
    size = max(1, _SLICE_ELEMENTS // max(1, len(tokens) * number))
    for start in range(0, number, size):
        rows = slice(start, min(start + size, number))
        distances = (y[rows, None] - y).abs() + (x[rows, None] - x).abs()
        yield _Similarities(rows, unit[:, rows] @ unit.mT, distances)


def _by_distance(
    tokens: Tensor, grid: tuple[int, int]
) -> tuple[Float64[Tensor, "images distances"], Float64[Tensor, " distances"]]:
    """Returns the sum of similarities over ordered pairs at distance 0, 1, ..., and their number.

    Up to the largest distance on the grid.
    """
    number = sum(grid) - 1
    sums = tokens.new_zeros(len(tokens), number, dtype=torch.float64)
    counts = tokens.new_zeros(number, dtype=torch.float64)
    for part in _similarities(tokens, grid, epsilon=_EPSILON):
        places = part.distances.flatten()
        sums.index_add_(1, places, part.values.flatten(1).double())
        counts += torch.bincount(places, minlength=number)
    return sums, counts


def _normalised(tokens: Tensor, epsilon: float) -> Tensor:
    return torch.nn.functional.normalize(tokens.float(), dim=-1, eps=epsilon)
