"""Power-function averages of weights, and the post-hoc reconstruction of other lengths.

If an average weights the past by a power of time, its length `sigma_rel` is a constant share of the
training so far. Two of them, stored in checkpoints during training, span the averages of other
lengths. Source: Karras et al., "Analyzing and improving the training dynamics of diffusion
models" (EDM2), section 3 and appendix C.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LARGEST_SIGMA = 0.25
"""No power function has a length above about 0.28."""


class PowerAverage(NamedTuple):
    """A power-function average at one step of the training."""

    step: int
    """Optimizer steps taken."""

    gamma: float
    """The exponent of time."""


def gamma_of(sigma_rel: float) -> float:
    """Returns the exponent whose average has the relative length `sigma_rel`, in (0, 0.25]."""
    inverse = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def sigma_of(gamma: float) -> float:
    """Returns the relative length: the standard deviation of the profile, as a share of time."""
    return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


def power_decay(gamma: float, step: int) -> float:
    """Returns the decay after optimizer step `step` (from 1); at step 1 it is 0."""
    return (1 - 1 / step) ** (gamma + 1)


class Combination(NamedTuple):
    """Factors by which stored averages sum to another one."""

    factors: list[float]
    """One per stored average; they sum to 1."""

    error: float
    """L2 distance between the combined and the wanted profile, relative to the latter's norm.

    Profile: the weight that an average gives to each time of the training.
    """


def combination(stored: Sequence[PowerAverage], wanted: PowerAverage) -> Combination:
    """Returns the combination of `stored` that is closest to `wanted`.

    It is the least-squares solution for the profiles over time (EDM2, Algorithm 3), in float64,
    divided by its sum as in EDM2's own code: else it would scale all weights of the model.
    """
    products = np.array([[_product(a, b) for b in stored] for a in stored])
    targets = np.array([_product(a, wanted) for a in stored])
    # Checkpoints close in time make the system nearly singular; a pseudo-inverse can handle that.
    factors = np.linalg.pinv(products, rcond=1e-12) @ targets
    if not factors.sum() > 0:
        # The profiles do not overlap.
        return Combination([1 / len(stored)] * len(stored), float("inf"))
    factors /= factors.sum()
    own = _product(wanted, wanted)
    squared = factors @ products @ factors - 2 * factors @ targets + own
    return Combination(factors.tolist(), float(np.sqrt(max(squared, 0.0) / own)))


def _product(a: PowerAverage, b: PowerAverage) -> float:
    """Returns the inner product of two profiles: (gamma + 1) tau^gamma / t^(gamma + 1) up to t."""
    shorter = min(a.step, b.step)
    ratio = (shorter / a.step) ** a.gamma * (shorter / b.step) ** b.gamma
    scale = (a.gamma + 1) * (b.gamma + 1) / ((a.gamma + b.gamma + 1) * max(a.step, b.step))
    return ratio * scale
