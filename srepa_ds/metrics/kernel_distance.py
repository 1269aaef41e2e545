"""The kernel distance (KID): an unbiased maximum mean discrepancy of features."""

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from srepa_ds.errors import DataError

NUM_SUBSETS = 100
SUBSET_SIZE = 1000
_SEED = 2020


def kernel_distance(
    samples: Float[Tensor, "samples width"],
    reference: Float[Tensor, "reference width"],
    *,
    num_subsets: int = NUM_SUBSETS,
    subset_size: int = SUBSET_SIZE,
) -> float:
    """Returns the mean over subsets of the unbiased squared maximum mean discrepancy.

    The kernel is (u'v / width + 1)^3. Subsets are drawn by index, without replacement, with the
    seed and the generator that torch-fidelity uses, so that they do not depend on ranks or batches.
    0 on average for sets of one distribution, so single values may be negative. Source: Binkowski
    et al. (2018). Raises DataError for sets smaller than a subset or features that are not finite.
    """
    if subset_size < 2:
        raise ValueError(f"an unbiased estimate needs subsets of at least 2, got {subset_size}")
    for name, features in (("sample", samples), ("reference", reference)):
        check_subset_size(name, len(features), subset_size=subset_size)
        if not features.isfinite().all():
            raise DataError(f"features of the {name} images hold NaN or infinity")
    generator = np.random.RandomState(_SEED)
    distances = []
    for _ in range(num_subsets):
        ours, theirs = (
            features[_choice(generator, len(features), subset_size).to(features.device)]
            for features in (samples, reference)
        )
        distances.append(_discrepancy(ours, theirs))
    return torch.stack(distances).mean().item()


def check_subset_size(name: str, count: int, *, subset_size: int = SUBSET_SIZE) -> None:
    """Checks that a set of `count` images is as large as a subset; raises DataError."""
    if count < subset_size:
        raise DataError(
            f"the kernel distance takes subsets of {subset_size:,} images, but there are {count:,} "
            f"{name} images; take more, or leave this score out"
        )


def _choice(generator: np.random.RandomState, count: int, size: int) -> Tensor:
    return torch.from_numpy(generator.choice(count, size, replace=False))


def _discrepancy(samples: Tensor, reference: Tensor) -> Float64[Tensor, ""]:
    own = _mean_of_pairs(samples) + _mean_of_pairs(reference)
    return own - 2 * _kernel(samples, reference).mean()


def _mean_of_pairs(features: Tensor) -> Float64[Tensor, ""]:
    """Returns the kernel's mean over pairs of different rows."""
    values = _kernel(features, features)
    return (values.sum() - values.trace()) / (len(features) * (len(features) - 1))


def _kernel(rows: Tensor, columns: Tensor) -> Float64[Tensor, "rows columns"]:
    # The distance is a small difference of large means. Rounding of single products averages out,
    # that of their sums would not.
    if rows.dtype != torch.float64:
        rows, columns = rows.float(), columns.float()
    inner = (rows @ columns.T).double() / rows.shape[1] + 1
    return inner * inner * inner
