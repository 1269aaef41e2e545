"""Guidance inside an interval of time: by the null label, or by a weaker model."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

VelocityModel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t, t (b,), labels (b,)) -> velocity of the shape of x_t."""


@dataclass(frozen=True)
class Guidance:
    """The strength of guidance, and the times at which it acts (t = 1 is noise).

    `scale` alone decides whether there is guidance. Where there is, `cls_scale` guides a class
    token (REG); 0 leaves it unguided. `channels` limits it to the first channels of the image.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0
    cls_scale: float = 0.0
    channels: int | None = None

    def active(self, t: float) -> bool:
        """Returns whether time `t` is guided; both bounds belong to the interval."""
        return self.scale > 1 and self.low <= t <= self.high

    @property
    def cls_branch_scale(self) -> float:
        """A class token's scale during guidance: 1, the conditional branch, if `cls_scale` is 0."""
        return self.cls_scale or 1.0


def guided_velocity(
    model: VelocityModel,
    x_t: Float[Tensor, " batch *event"],
    t: Float[Tensor, " batch"],
    labels: Int[Tensor, " batch"],
    *,
    null_label: int,
    scale: float | Float[Tensor, "*event"],
) -> Float[Tensor, " batch *event"]:
    """Returns v_null + scale * (v_class - v_null) in float64, both from one doubled batch.

    Guides every channel; a tensor gives each element its own scale. Source: Ho and Salimans,
    "Classifier-free diffusion guidance"; guiding the velocity equals guiding the drift of the SDE,
    which is affine in it.
    """
    nulls = torch.full_like(labels, null_label)
    doubled = model(torch.cat((x_t, x_t)), torch.cat((t, t)), torch.cat((labels, nulls)))
    conditional, unconditional = doubled.double().chunk(2)
    return unconditional + scale * (conditional - unconditional)


def autoguided_velocity(
    model: VelocityModel,
    guide: VelocityModel,
    x_t: Float[Tensor, " batch *event"],
    t: Float[Tensor, " batch"],
    labels: Int[Tensor, " batch"],
    *,
    scale: float | Float[Tensor, "*event"],
) -> Float[Tensor, " batch *event"]:
    """Returns v_guide + scale * (v - v_guide) in float64, both for the same labels.

    Source: Karras et al., "Guiding a diffusion model with a bad version of itself" (2024), whose
    denoisers are affine in the velocity, so that guiding either is the same.
    """
    strong = model(x_t, t, labels).double()
    weak = guide(x_t, t, labels).double()
    return weak + scale * (strong - weak)


@dataclass(frozen=True)
class GuidedModel:
    """A velocity model with its labels and guidance, for the solvers to integrate.

    The model sees states and times in `dtype`; velocities come back in float64. `scales` (*event),
    if given, replaces the guidance's scale element by element. `guide`, if given, takes the place
    of the model without a class.
    """

    model: VelocityModel
    labels: Tensor
    null_label: int
    guidance: Guidance
    dtype: torch.dtype = torch.float32
    scales: Tensor | None = None
    guide: VelocityModel | None = None

    def __call__(
        self, x_t: Float[Tensor, " batch *event"], t: float, guidance_t: float
    ) -> Float[Tensor, " batch *event"]:
        """Returns the float64 velocity at time `t`, guided if `guidance_t` is in the interval."""
        x_t = x_t.to(self.dtype)
        times = torch.full((len(x_t),), t, dtype=torch.float64, device=x_t.device).to(self.dtype)
        if not self.guidance.active(guidance_t):
            return self.model(x_t, times, self.labels).double()
        scale = self.guidance.scale if self.scales is None else self.scales
        if self.guide is not None:
            return autoguided_velocity(self.model, self.guide, x_t, times, self.labels, scale=scale)
        return guided_velocity(
            self.model, x_t, times, self.labels, null_label=self.null_label, scale=scale
        )
