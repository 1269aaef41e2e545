"""Precision and recall of generated samples by k-nearest-neighbour balls, in bounded memory."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from srepa_ds.errors import DataError

Arithmetic = Literal["fp32", "fp16"]

NUM_NEIGHBOURS = 3
"""The neighbour whose distance is a ball's radius, as in ADM's evaluator."""

ADM_BLOCK_SIZE = 10_000
"""Rows of a distance block in ADM's evaluator; they decide where fp16 falls back to fp32."""


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """Which points lie inside the other set's manifold, and their fractions."""

    in_reference: Bool[Tensor, " samples"]
    in_samples: Bool[Tensor, " reference"]

    @property
    def precision(self) -> float:
        """Returns the fraction of the samples inside the reference's manifold."""
        return self.in_reference.double().mean().item()

    @property
    def recall(self) -> float:
        """Returns the fraction of the reference inside the samples' manifold."""
        return self.in_samples.double().mean().item()


def precision_by_class(
    in_reference: Bool[Tensor, " samples"],
    labels: Int64[Tensor, " samples"],
    *,
    num_classes: int,
) -> Float64[Tensor, " num_classes"]:
    """Returns each class's fraction of samples inside the reference's manifold.

    NaN for classes without samples.
    """
    inside = torch.bincount(labels[in_reference], minlength=num_classes)
    return inside.double() / torch.bincount(labels, minlength=num_classes)


def precision_recall(
    samples: Float[Tensor, "samples width"],
    reference: Float[Tensor, "reference width"],
    *,
    num_neighbours: int = NUM_NEIGHBOURS,
    block_size: int = 4096,
    arithmetic: Arithmetic = "fp32",
) -> PrecisionRecall:
    """Returns the fractions of samples in the reference's balls, and of the reference in theirs.

    A ball's radius is the distance to its `num_neighbours`-th neighbour in its own set. Memory
    grows with `block_size` squared. "fp16" rounds distances as ADM's evaluator does (use
    `ADM_BLOCK_SIZE` for parity); "fp32" is reproducible. Source: Kynkaanniemi et al. (2019), as ADM
    computes it. Raises DataError for sets too small or features that are not finite.
    """
    for name, features in (("sample", samples), ("reference", reference)):
        _check(name, features, num_neighbours)
    samples, reference = samples.float(), reference.float()
    options = {"block_size": block_size, "arithmetic": arithmetic}
    sample_radii = neighbour_radii(samples, num_neighbours=num_neighbours, **options)
    reference_radii = neighbour_radii(reference, num_neighbours=num_neighbours, **options)
    in_reference = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    in_samples = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    # Reference rows and sample columns, as in ADM: fp16 rounds the two norms in turn.
    for row in range(0, len(reference), block_size):
        rows = slice(row, row + block_size)
        for column in range(0, len(samples), block_size):
            columns = slice(column, column + block_size)
            distances = squared_distances(reference[rows], samples[columns], arithmetic=arithmetic)
            in_reference[columns] |= (distances <= reference_radii[rows, None]).any(dim=0)
            in_samples[rows] |= (distances <= sample_radii[columns]).any(dim=1)
    return PrecisionRecall(in_reference, in_samples)


def neighbour_radii(
    features: Float[Tensor, "points width"],
    *,
    num_neighbours: int,
    block_size: int = 4096,
    arithmetic: Arithmetic = "fp32",
) -> Float32[Tensor, " points"]:
    """Returns each point's squared distance to its `num_neighbours`-th neighbour in its own set.

    The point itself counts as neighbour 0, by its computed distance, as in ADM's evaluator.
    """
    radii = []
    for rows in features.split(block_size):
        smallest = rows.new_empty(len(rows), 0, dtype=torch.float32)
        for columns in features.split(block_size):
            distances = squared_distances(rows, columns, arithmetic=arithmetic)
            candidates = torch.cat((smallest, distances), dim=1)
            count = min(num_neighbours + 1, candidates.shape[1])
            smallest = candidates.topk(count, dim=1, largest=False).values
        radii.append(smallest.amax(dim=1))
    return torch.cat(radii)


def squared_distances(
    rows: Float[Tensor, "rows width"],
    columns: Float[Tensor, "columns width"],
    *,
    arithmetic: Arithmetic = "fp32",
) -> Float32[Tensor, "rows columns"]:
    """Returns |u|^2 - 2 u'v + |v|^2, clamped at 0, for every pair of a row u and a column v.

    "fp16" computes norms, products and sums in half precision, and falls back to fp32 for the whole
    block if any of its distances overflows. Source: ADM's evaluator.
    """
    if arithmetic == "fp16":
        distances = _expanded(rows.half(), columns.half())
        if distances.isfinite().all():
            return distances.float()
    return _expanded(rows.float(), columns.float())


def _expanded(rows: Tensor, columns: Tensor) -> Tensor:
    row_norms = rows.square().sum(dim=1)[:, None]
    column_norms = columns.square().sum(dim=1)[None, :]
    return (row_norms - 2 * (rows @ columns.T) + column_norms).clamp(min=0)


def check_count(name: str, count: int, *, num_neighbours: int = NUM_NEIGHBOURS) -> None:
    """Checks that a set of `count` images has neighbours enough; raises DataError."""
    if count <= num_neighbours:
        raise DataError(
            f"precision and recall need more than {num_neighbours} {name} images, got {count}"
        )


def _check(name: str, features: Tensor, num_neighbours: int) -> None:
    check_count(name, len(features), num_neighbours=num_neighbours)
    if not features.isfinite().all():
        raise DataError(f"features of the {name} images hold NaN or infinity")
