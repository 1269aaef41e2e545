"""Solvers of the sampling ODE and SDE, from noise (t = 1) to data (t = 0), in float64."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from torch import Tensor

from srepa_ds.sampling.guidance import Guidance
from srepa_ds.schema import Section, one_of

Velocity = Callable[[Tensor, float, float], Tensor]
"""(x_t, t, the time that decides about guidance) -> float64 velocity."""

Score = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(velocity, x_t, t (b,)) -> score of the marginal at t; an interpolant's `score`."""

NoiseOfStep = Callable[[int], Tensor]
"""Number of the step -> float64 standard normal noise of the state's shape."""

SDE_LAST_TIME = 0.04
"""The time at which the SDE's diffusion ends; one noiseless step leads from here to 0."""


@dataclass(frozen=True)
class Step:
    """One step of a grid, from `t` to `next_t`."""

    index: int
    t: float
    next_t: float
    is_last: bool


@dataclass(frozen=True)
class Dynamics:
    """The functions a step may call: velocity always, score and noise only for the SDE."""

    velocity: Velocity
    score: Score
    noise: NoiseOfStep


@dataclass(frozen=True)
class Solver:
    """A row of `SOLVERS`: the grid of times and the step taken on it."""

    grid: Callable[[int], Tensor]
    step: Callable[[Dynamics, Tensor, Step], Tensor]


def uniform_grid(num_steps: int) -> Float[Tensor, " nodes"]:
    """Returns `num_steps` + 1 equidistant float64 times from 1 to 0."""
    return torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)


def diffusion_grid(num_steps: int) -> Float[Tensor, " nodes"]:
    """Returns `num_steps` equidistant float64 times from 1 to 0.04, then 0 (REPA's SDE grid)."""
    inner = torch.linspace(1.0, SDE_LAST_TIME, num_steps, dtype=torch.float64)
    return torch.cat((inner, inner.new_zeros(1)))


def euler_step(
    dynamics: Dynamics, x_t: Float[Tensor, " batch *event"], step: Step
) -> Float[Tensor, " batch *event"]:
    """Returns the state at `step.next_t` after an Euler step of dx = v dt."""
    return x_t + (step.next_t - step.t) * dynamics.velocity(x_t, step.t, step.t)


def heun_step(
    dynamics: Dynamics, x_t: Float[Tensor, " batch *event"], step: Step
) -> Float[Tensor, " batch *event"]:
    """Returns the state at `step.next_t` after a Heun step; the last step is an Euler step.

    As in REPA, the time at the step's start decides whether both evaluations are guided.
    """
    dt = step.next_t - step.t
    velocity = dynamics.velocity(x_t, step.t, step.t)
    predicted = x_t + dt * velocity
    if step.is_last:
        return predicted
    return x_t + 0.5 * dt * (velocity + dynamics.velocity(predicted, step.next_t, step.t))


def euler_maruyama_step(
    dynamics: Dynamics, x_t: Float[Tensor, " batch *event"], step: Step
) -> Float[Tensor, " batch *event"]:
    """Returns the state at `step.next_t` of dx = (v - w s / 2) dt + sqrt(w) dW, w = 2 t.

    The diffusion is 2 t on every path; the last step has no noise. Source: SiT, Eq. 6, with the
    discretisation of REPA's sampler.
    """
    dt = step.next_t - step.t
    diffusion = 2.0 * step.t
    velocity = dynamics.velocity(x_t, step.t, step.t)
    times = torch.full((len(x_t),), step.t, dtype=torch.float64, device=x_t.device)
    drift = velocity - 0.5 * diffusion * dynamics.score(velocity, x_t, times)
    mean = x_t + drift * dt
    if step.is_last:
        return mean
    return mean + (diffusion * abs(dt)) ** 0.5 * dynamics.noise(step.index)


SOLVERS = {
    "euler": Solver(uniform_grid, euler_step),
    "heun": Solver(uniform_grid, heun_step),
    "euler_maruyama": Solver(diffusion_grid, euler_maruyama_step),
}


def integrate(
    dynamics: Dynamics,
    x_start: Float[Tensor, " batch *event"],
    *,
    solver: str,
    num_steps: int,
) -> Float[Tensor, " batch *event"]:
    """Returns the float64 state at t = 0 of the path that starts at `x_start` at t = 1."""
    row = SOLVERS[solver]
    x_t = x_start.double()
    # Times are Python floats: the grid is known beforehand and no step waits for the device.
    spans = list(pairwise(row.grid(num_steps).tolist()))
    for index, (t, next_t) in enumerate(spans):
        step = Step(index, t, next_t, is_last=index == len(spans) - 1)
        x_t = row.step(dynamics, x_t, step)
    return x_t


def _class_number(key: Any) -> Any:
    """Returns the number that a key is; raises ValueError for text that is none, or is `03`."""
    if isinstance(key, str) and not re.fullmatch(r"0|[1-9][0-9]{0,9}", key):
        raise ValueError(f"{key!r} is no class; write its number, such as 3")
    return int(key) if isinstance(key, str) else key


_Label = Annotated[int, Field(ge=0, lt=1 << 31)]
_Counted = Annotated[_Label, BeforeValidator(_class_number)]
_InTurn = Annotated[tuple[_Label, ...], Tag("in turn")]
_Counts = Annotated[dict[_Counted, Annotated[int, Field(ge=1, lt=1 << 40)]], Tag("counts")]


def _form_of_labels(labels: Any) -> str:
    return "counts" if isinstance(labels, dict) else "in turn"


class SamplerConfig(Section):
    """The sampler: solver, guidance, labels and the size of the set."""

    solver: Annotated[str, one_of("solver", SOLVERS)] = "euler_maruyama"
    """Name in the table of solvers: euler and heun solve the ODE, euler_maruyama the SDE."""

    num_steps: Annotated[int, Field(ge=1, lt=1 << 24)] = 250
    """Steps from noise to data; heun evaluates the model twice in all but the last."""

    cfg_scale: Annotated[float, Field(ge=1)] = 1.0
    """Scale of classifier-free guidance; 1 turns it off."""

    cls_cfg_scale: Annotated[float, Field(ge=0)] = 0.0
    """REG: scale of the class token's guidance, wherever the image is guided; 0 turns it off. Above
    0 it needs a `cfg_scale` above 1, without which nothing is guided."""

    guidance_low: Annotated[float, Field(ge=0, le=1)] = 0.0
    """First time (t = 1 is noise) that is guided, itself included."""

    guidance_high: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Last time (t = 1 is noise) that is guided, itself included."""

    label_mode: Literal["random", "balanced"] = "random"
    """random draws each label; balanced cycles through the classes. `labels` overrides both."""

    labels: Annotated[_InTurn | _Counts, Discriminator(_form_of_labels)] | None = None
    """Classes to draw, instead of all: a list, which is repeated in turn ([3, 7]), or the number of
    images of each ({"3": 100, "7": 50}), drawn in the order of the classes; `num_samples` is then
    their sum. Pictures and distances during training always show all classes."""

    num_samples: Annotated[int, Field(ge=1)] = 50_000
    """Number of images in the set."""

    batch_size: Annotated[int, Field(ge=1)] = 64
    """Images per chunk: one rank draws them at once, and one part file holds them."""

    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Seed of start noise, labels and SDE noise; image i of a seed is always the same image."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the model: plain fp32 or bf16 autocast; the solver's state is float64."""

    @property
    def guidance(self) -> Guidance:
        """Returns scale and interval of the guidance."""
        return Guidance(self.cfg_scale, self.guidance_low, self.guidance_high, self.cls_cfg_scale)

    @model_validator(mode="after")
    def _interval_is_ordered(self) -> "SamplerConfig":
        if self.guidance_low > self.guidance_high:
            raise ValueError(
                f"guidance_low ({self.guidance_low}) is above guidance_high "
                f"({self.guidance_high}); the interval is empty"
            )
        return self

    @model_validator(mode="after")
    def _labels_are_of_the_set(self) -> "SamplerConfig":
        if self.labels is not None and not self.labels:
            raise ValueError("labels names no class; name one, or leave it out to draw all")
        if isinstance(self.labels, dict):
            total = sum(self.labels.values())
            if "num_samples" not in self.model_fields_set:
                # The section is frozen for everybody else.
                object.__setattr__(self, "num_samples", total)
            elif self.num_samples != total:
                raise ValueError(
                    f"labels asks for {total} images in all, num_samples for {self.num_samples}; "
                    f"set num_samples to {total}, or leave it out"
                )
        return self

    @model_validator(mode="after")
    def _class_token_is_guided_with_the_image(self) -> "SamplerConfig":
        if self.cls_cfg_scale > 0 and self.cfg_scale <= 1:
            raise ValueError(
                f"cls_cfg_scale ({self.cls_cfg_scale}) guides the class token only where the image "
                f"is guided, which cfg_scale ({self.cfg_scale}) never does; set cfg_scale above 1, "
                "or cls_cfg_scale to 0"
            )
        return self


@dataclass(frozen=True)
class Evaluations:
    """Model calls per batch: in all, and with the batch doubled for guidance."""

    total: int
    guided: int


def count_evaluations(config: SamplerConfig) -> Evaluations:
    """Returns the number of model calls per image, counted by solving for an empty batch."""
    guided = []

    def velocity(x_t: Tensor, t: float, guidance_t: float) -> Tensor:
        guided.append(config.guidance.active(guidance_t))
        return x_t

    nothing = torch.zeros(0, 1, dtype=torch.float64)
    dynamics = Dynamics(velocity, lambda velocity, x_t, t: x_t, lambda index: nothing)
    integrate(dynamics, nothing, solver=config.solver, num_steps=config.num_steps)
    return Evaluations(len(guided), sum(guided))
