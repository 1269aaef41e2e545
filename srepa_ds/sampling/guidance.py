"""Classifier-free guidance inside an interval of time (contract of REPA's samplers)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

VelocityModel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t, t (b,), labels (b,)) -> velocity of the shape of x_t."""


@dataclass(frozen=True)
class Guidance:
    """How strongly velocities are guided, and during which times (t = 1 is noise)."""

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def active(self, t: float) -> bool:
        """Returns whether time `t` is guided; both bounds belong to the interval."""
        return self.scale > 1 and self.low <= t <= self.high


def guided_velocity(
    model: VelocityModel,
    x_t: Float[Tensor, "batch channels height width"],
    t: Float[Tensor, "batch"],
    labels: Int[Tensor, "batch"],
    *,
    null_label: int,
    scale: float,
) -> Float[Tensor, "batch channels height width"]:
    """Returns v_null + scale * (v_class - v_null) in float64, both from one doubled batch.

    Guides every channel. Source: Ho and Salimans, "Classifier-free diffusion guidance"; guiding
    the velocity equals guiding the drift of the SDE, which is affine in it.
    """
    nulls = torch.full_like(labels, null_label)
    doubled = model(torch.cat((x_t, x_t)), torch.cat((t, t)), torch.cat((labels, nulls)))
    conditional, unconditional = doubled.double().chunk(2)
    return unconditional + scale * (conditional - unconditional)


@dataclass(frozen=True)
class GuidedModel:
    """A velocity model with its labels and guidance: what the solvers integrate.

    The model sees states and times in `dtype`; velocities come back in float64.
    """

    model: VelocityModel
    labels: Tensor
    null_label: int
    guidance: Guidance
    dtype: torch.dtype = torch.float32

    def __call__(
        self, x_t: Float[Tensor, "batch channels height width"], t: float, guidance_t: float
    ) -> Float[Tensor, "batch channels height width"]:
        """Returns the float64 velocity at time `t`, guided if `guidance_t` is in the interval."""
        x_t = x_t.to(self.dtype)
        times = torch.full((len(x_t),), t, dtype=torch.float64, device=x_t.device).to(self.dtype)
        if not self.guidance.active(guidance_t):
            return self.model(x_t, times, self.labels).double()
        return guided_velocity(
            self.model,
            x_t,
            times,
            self.labels,
            null_label=self.null_label,
            scale=self.guidance.scale,
        )
