"""The path between data (t = 0) and noise (t = 1), and the flow-matching loss on it.

Time runs as in the reference code (t = 1 is noise), the reverse of Eq. 1 in the paper. Paths are
stateless; everything here is a pure function of tensors.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from srepa_ds.noise import normal, uniform
from srepa_ds.schema import Section, one_of

_HALF_PI = math.pi / 2


@dataclass(frozen=True)
class Coefficients:
    """x_t = alpha_t * x + sigma_t * noise, and the derivatives in t; all shaped as t."""

    alpha_t: Float[Tensor, "*times"]
    sigma_t: Float[Tensor, "*times"]
    d_alpha_t: Float[Tensor, "*times"]
    d_sigma_t: Float[Tensor, "*times"]


@dataclass(frozen=True)
class Noised:
    """Noised data and the velocity the model has to predict from it."""

    x_t: Float[Tensor, " batch *event"]
    t: Float[Tensor, " batch"]
    velocity: Float[Tensor, " batch *event"]


class Interpolant(ABC):
    """A path from data to noise; stateless, so one instance serves all."""

    @abstractmethod
    def coefficients(self, t: Float[Tensor, "*times"]) -> Coefficients:
        """Returns alpha_t, sigma_t and their derivatives at `t` in [0, 1]."""

    @abstractmethod
    def score(
        self,
        velocity: Float[Tensor, " batch *event"],
        x_t: Float[Tensor, " batch *event"],
        t: Float[Tensor, " batch"],
    ) -> Float[Tensor, " batch *event"]:
        """Returns the score of p_t at `x_t`; finite for t in (0, 1], infinite at t = 0."""

    @abstractmethod
    def time_at_ratio(self, ratio: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        """Returns the t at which sigma_t / alpha_t is `ratio`."""

    def noised(
        self,
        x: Float[Tensor, " batch *event"],
        noise: Float[Tensor, " batch *event"],
        t: Float[Tensor, " batch"],
    ) -> Noised:
        """Returns x_t = alpha_t x + sigma_t noise and its velocity alpha_t' x + sigma_t' noise.

        On the linear path the velocity is noise - x (Eq. 2 in reversed time).
        """
        coefficients = self.coefficients(_over_event(t, x))
        return Noised(
            x_t=coefficients.alpha_t * x + coefficients.sigma_t * noise,
            t=t,
            velocity=coefficients.d_alpha_t * x + coefficients.d_sigma_t * noise,
        )


class LinearInterpolant(Interpolant):
    """alpha_t = 1 - t, sigma_t = t (the paper's Table 8)."""

    def coefficients(self, t: Float[Tensor, "*times"]) -> Coefficients:
        """Returns alpha_t, sigma_t and their derivatives at `t` in [0, 1]."""
        one = torch.ones_like(t)
        return Coefficients(alpha_t=1 - t, sigma_t=t, d_alpha_t=-one, d_sigma_t=one)

    def score(
        self,
        velocity: Float[Tensor, " batch *event"],
        x_t: Float[Tensor, " batch *event"],
        t: Float[Tensor, " batch"],
    ) -> Float[Tensor, " batch *event"]:
        """Returns the score -(x_t + (1 - t) velocity) / t; infinite at t = 0."""
        t = _over_event(t, x_t)
        return -(x_t + (1 - t) * velocity) / t

    def time_at_ratio(self, ratio: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        """Returns the t at which sigma_t / alpha_t is `ratio`."""
        return ratio / (1 + ratio)


class CosineInterpolant(Interpolant):
    """alpha_t = cos(pi t / 2), sigma_t = sin(pi t / 2): constant variance."""

    def coefficients(self, t: Float[Tensor, "*times"]) -> Coefficients:
        """Returns alpha_t, sigma_t and their derivatives at `t` in [0, 1]."""
        alpha_t, sigma_t = torch.cos(_HALF_PI * t), torch.sin(_HALF_PI * t)
        return Coefficients(
            alpha_t=alpha_t,
            sigma_t=sigma_t,
            d_alpha_t=-_HALF_PI * sigma_t,
            d_sigma_t=_HALF_PI * alpha_t,
        )

    def score(
        self,
        velocity: Float[Tensor, " batch *event"],
        x_t: Float[Tensor, " batch *event"],
        t: Float[Tensor, " batch"],
    ) -> Float[Tensor, " batch *event"]:
        """Returns the score -(2 / pi) cot(pi t / 2) velocity - x_t; infinite at t = 0."""
        # cos / sin, not 1 / tan: near t = 1 the tangent runs off while its inverse must reach 0.
        angle = _over_event(_HALF_PI * t, x_t)
        return -(torch.cos(angle) / torch.sin(angle) / _HALF_PI) * velocity - x_t

    def time_at_ratio(self, ratio: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        """Returns the t at which sigma_t / alpha_t is `ratio`."""
        return torch.atan(ratio) / _HALF_PI


INTERPOLANTS: dict[str, Interpolant] = {
    "linear": LinearInterpolant(),
    "cosine": CosineInterpolant(),
}


@dataclass(frozen=True)
class TimeWeighting:
    """A distribution of times: a draw (a function of noise.py) and the map from it to a time."""

    draw: Callable[..., Tensor]
    time: Callable[[Interpolant, Tensor], Tensor]


TIME_WEIGHTINGS = {
    "uniform": TimeWeighting(draw=uniform, time=lambda path, draw: draw),
    "lognormal": TimeWeighting(draw=normal, time=lambda path, draw: path.time_at_ratio(draw.exp())),
}


def sample_time(
    weighting: TimeWeighting, interpolant: Interpolant, draw: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Returns training times in [0, 1] computed from `draw`, the output of `weighting.draw`.

    "uniform" is the draw itself; "lognormal" puts sigma_t / alpha_t = exp(draw), which on the
    linear path is the logit-normal distribution.
    """
    return weighting.time(interpolant, draw)


def flow_loss(
    prediction: Float[Tensor, " batch *event"], velocity: Float[Tensor, " batch *event"]
) -> Float[Tensor, " batch"]:
    """Returns each sample's mean squared error (Eq. 3 as a mean), in float32 or wider."""
    dtype = torch.promote_types(
        torch.promote_types(prediction.dtype, velocity.dtype), torch.float32
    )
    return (prediction.to(dtype) - velocity.to(dtype)).square().flatten(1).mean(dim=1)


def _over_event(t: Tensor, x: Tensor) -> Tensor:
    """Returns `t` (batch,) with trailing axes of size 1, to be multiplied with `x`."""
    return t.reshape(t.shape + (1,) * (x.ndim - 1))


class InterpolantConfig(Section):
    """The path from data to noise and the distribution of training times."""

    path: Annotated[str, one_of("path", INTERPOLANTS)] = "linear"
    """The path from data to noise."""

    time_weighting: Annotated[str, one_of("time weighting", TIME_WEIGHTINGS)] = "uniform"
    """The distribution of training times."""
