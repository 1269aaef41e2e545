"""Precision and recall of generated samples by k-nearest-neighbour balls, in bounded memory."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from srepa_ds.errors import DataError
from srepa_ds.metrics.distances import Arithmetic, Block, are_finite, dtypes_of

NUM_NEIGHBOURS = 3
"""The neighbour whose distance is a ball's radius, as in ADM's evaluator."""

ADM_BLOCK_SIZE = 10_000
"""Rows of a distance block in ADM's evaluator; they decide where fp16 falls back to fp32."""

_EVERY = slice(None)
_OVERFLOW = "distances between the features overflow; check the images and the network"


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
) -> dict[int, float]:
    """Returns the fraction of samples inside the reference's manifold by class, as far as a class
    has samples, in ascending order."""
    classes, places, counts = labels.unique(return_inverse=True, return_counts=True)
    inside = places[in_reference].bincount(minlength=len(classes))
    return dict(zip(classes.tolist(), (inside.double() / counts).tolist(), strict=True))


def precision_recall(
    samples: Float[Tensor, "samples width"],
    reference: Float[Tensor, "reference width"],
    *,
    num_neighbours: int = NUM_NEIGHBOURS,
    block_size: int = ADM_BLOCK_SIZE,
    arithmetic: Arithmetic = "fp32",
) -> PrecisionRecall:
    """Returns which samples are in the reference's balls, and which of the reference in theirs.

    A ball's radius is the distance to its `num_neighbours`-th neighbour in its own set. "fp16"
    rounds distances as ADM's evaluator does, and falls back to fp32 in each block of `block_size`
    rows and columns that overflows; "fp32" is reproducible. Memory does not grow with
    `block_size`. Source: Kynkaanniemi et al. (2019), as ADM computes it. Raises DataError for sets
    too small or features that are not finite.
    """
    for name, features in (("sample", samples), ("reference", reference)):
        _check(name, features, num_neighbours)
    samples, reference = samples.float(), reference.float()
    reference_radii, sample_radii = (
        neighbour_radii(
            features, num_neighbours=num_neighbours, block_size=block_size, arithmetic=arithmetic
        )
        for features in (reference, samples)
    )
    in_reference = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    in_samples = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    # Reference rows and sample columns, as in ADM: fp16 rounds the two norms in turn.
    for start in range(0, len(reference), block_size):
        rows = slice(start, start + block_size)
        for column in range(0, len(samples), block_size):
            columns = slice(column, column + block_size)
            balls = (
                _Balls(reference[rows], reference_radii[rows]),
                _Balls(samples[columns], sample_radii[columns]),
            )
            rows_inside, columns_inside = _inside(*balls, arithmetic)
            in_samples[rows] |= rows_inside
            in_reference[columns] |= columns_inside
    return PrecisionRecall(in_reference, in_samples)


@dataclass(frozen=True)
class _Balls:
    centres: Tensor
    radii: Tensor


def _inside(rows: _Balls, columns: _Balls, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """Returns which rows are in any column's ball, and which columns in any row's."""
    for dtype in dtypes_of(arithmetic):
        rows_inside = torch.zeros_like(rows.radii, dtype=torch.bool)
        columns_inside = torch.zeros_like(columns.radii, dtype=torch.bool)
        for part in Block(rows.centres, columns.centres, dtype).slices():
            distances = part.distances()
            if not are_finite(distances):
                break
            # Radii may be those of fp32 blocks, which half precision would round.
            distances = distances.float()
            rows_inside[part.rows] = (distances <= columns.radii).any(dim=1)
            columns_inside |= (distances <= rows.radii[part.rows, None]).any(dim=0)
        else:
            return rows_inside, columns_inside
    raise DataError(_OVERFLOW)


def neighbour_radii(
    features: Float[Tensor, "points width"],
    *,
    num_neighbours: int,
    block_size: int = ADM_BLOCK_SIZE,
    arithmetic: Arithmetic = "fp32",
) -> Float32[Tensor, " points"]:
    """Returns each point's squared distance to its `num_neighbours`-th neighbour in its own set.

    The point itself counts as neighbour 0, by its computed distance, as in ADM's evaluator.
    Infinite for sets without so many neighbours. Raises DataError for features so large that their
    squares overflow.
    """
    count = num_neighbours + 1
    blocks = features.split(block_size)
    nearest = [_Nearest(block, count) for block in blocks]
    for number, rows in enumerate(blocks):
        nearest[number].add(_EVERY, _nearest_in_own(rows, count, arithmetic).distances)
        for other in range(number + 1, len(blocks)):
            # The products of two blocks serve both ways.
            forward, backward = _nearest_both_ways(rows, blocks[other], count, arithmetic)
            nearest[number].add(_EVERY, forward.distances)
            nearest[other].add(_EVERY, backward.distances)
    return torch.cat([found.distances.amax(dim=1) for found in nearest])


class _Nearest:
    """The `count` smallest distances of each point, so far; infinite ones stand for none."""

    def __init__(self, points: Tensor, count: int):
        self.distances = points.new_full((len(points), count), torch.inf, dtype=torch.float32)

    def add(self, places: slice, distances: Tensor) -> None:
        """Adds distances (points at `places`, others), of any dtype."""
        kept = self.distances[places]
        smallest = distances.topk(min(kept.shape[1], distances.shape[1]), dim=1, largest=False)
        candidates = torch.cat((kept, smallest.values.float()), dim=1)
        self.distances[places] = candidates.topk(kept.shape[1], dim=1, largest=False).values


def _nearest_in_own(points: Tensor, count: int, arithmetic: Arithmetic) -> _Nearest:
    """Returns the nearest points of the same block, by half of its products."""
    for dtype in dtypes_of(arithmetic):
        nearest = _Nearest(points, count)
        for part in Block(points, points, dtype).slices(upper=True):
            distances, exchanged = part.distances(), part.distances_from_columns()
            if not (are_finite(distances) and are_finite(exchanged)):
                break
            nearest.add(part.rows, distances)
            later = slice(part.rows.stop, None)
            nearest.add(later, exchanged[:, len(distances) :].T.contiguous())
        else:
            return nearest
    raise DataError(_OVERFLOW)


def _nearest_both_ways(
    rows: Tensor, columns: Tensor, count: int, arithmetic: Arithmetic
) -> tuple[_Nearest, _Nearest]:
    """Returns the rows' nearest columns and the columns' nearest rows.

    As two blocks, of which each falls back to fp32 for itself.
    """
    forward: _Nearest | None = None
    backward: _Nearest | None = None
    for dtype in dtypes_of(arithmetic):
        found = _nearest_in(Block(rows, columns, dtype), count)
        forward, backward = forward or found[0], backward or found[1]
        if forward and backward:
            return forward, backward
    raise DataError(_OVERFLOW)


def _nearest_in(block: Block, count: int) -> tuple[_Nearest | None, _Nearest | None]:
    """Returns the nearest both ways, None where a distance overflows."""
    forward: _Nearest | None = _Nearest(block.rows, count)
    backward: _Nearest | None = _Nearest(block.columns, count)
    for part in block.slices():
        forward = _added(forward, part.rows, part.distances())
        backward = _added(backward, _EVERY, part.distances_from_columns(), exchanged=True)
        if forward is None and backward is None:
            break
    return forward, backward


def _added(
    nearest: _Nearest | None, places: slice, distances: Tensor, *, exchanged: bool = False
) -> _Nearest | None:
    """Returns `nearest` with more distances, None from the first that overflows."""
    if nearest is None or not are_finite(distances):
        return None
    nearest.add(places, distances.T.contiguous() if exchanged else distances)
    return nearest


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
