"""Solvers of the sampling ODE and SDE, from noise (t = 1) to data (t = 0), in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

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


def advanced(
    x_t: Float[Tensor, " batch *event"], velocity: Float[Tensor, " batch *event"], step: Step
) -> Float[Tensor, " batch *event"]:
    """Returns the state at `step.next_t` if `velocity` holds for the whole step."""
    return x_t + (step.next_t - step.t) * velocity


def corrected(
    x_t: Float[Tensor, " batch *event"],
    velocity: Float[Tensor, " batch *event"],
    next_velocity: Float[Tensor, " batch *event"],
    step: Step,
) -> Float[Tensor, " batch *event"]:
    """Returns the state at `step.next_t` by the mean of the velocities at both ends (Heun)."""
    dt = step.next_t - step.t
    return x_t + 0.5 * dt * (velocity + next_velocity)


def diffused(
    x_t: Float[Tensor, " batch *event"],
    velocity: Float[Tensor, " batch *event"],
    step: Step,
    *,
    score: Score,
    noise: NoiseOfStep,
) -> Float[Tensor, " batch *event"]:
    """Returns the state at `step.next_t` of dx = (v - w s / 2) dt + sqrt(w) dW, w = 2 t.

    The diffusion is 2 t on every path; the last step asks for no noise. Source: SiT, Eq. 6, with
    the discretisation of REPA's sampler.
    """
    dt = step.next_t - step.t
    diffusion = 2.0 * step.t
    times = torch.full((len(x_t),), step.t, dtype=torch.float64, device=x_t.device)
    drift = velocity - 0.5 * diffusion * score(velocity, x_t, times)
    mean = x_t + drift * dt
    if step.is_last:
        return mean
    return mean + (diffusion * abs(dt)) ** 0.5 * noise(step.index)


def euler_step(
    dynamics: Dynamics, x_t: Float[Tensor, " batch *event"], step: Step
) -> Float[Tensor, " batch *event"]:
    """Returns the state at `step.next_t` after an Euler step of dx = v dt."""
    return advanced(x_t, dynamics.velocity(x_t, step.t, step.t), step)


def heun_step(
    dynamics: Dynamics, x_t: Float[Tensor, " batch *event"], step: Step
) -> Float[Tensor, " batch *event"]:
    """Returns the state at `step.next_t` after a Heun step; the last step is an Euler step.

    As in REPA, the time at the step's start decides whether both evaluations are guided.
    """
    velocity = dynamics.velocity(x_t, step.t, step.t)
    predicted = advanced(x_t, velocity, step)
    if step.is_last:
        return predicted
    return corrected(x_t, velocity, dynamics.velocity(predicted, step.next_t, step.t), step)


def euler_maruyama_step(
    dynamics: Dynamics, x_t: Float[Tensor, " batch *event"], step: Step
) -> Float[Tensor, " batch *event"]:
    """Returns the state at `step.next_t` after an Euler-Maruyama step of the SDE in `diffused`."""
    velocity = dynamics.velocity(x_t, step.t, step.t)
    return diffused(x_t, velocity, step, score=dynamics.score, noise=dynamics.noise)


SOLVERS = {
    "euler": Solver(uniform_grid, euler_step),
    "heun": Solver(uniform_grid, heun_step),
    "euler_maruyama": Solver(diffusion_grid, euler_maruyama_step),
}


def steps_of(solver: str, num_steps: int) -> tuple[Step, ...]:
    """Returns the steps on a solver's grid, from noise to data."""
    # Times are Python floats: the grid is known beforehand and no step waits for the device.
    spans = list(pairwise(SOLVERS[solver].grid(num_steps).tolist()))
    last = len(spans) - 1
    return tuple(Step(i, t, next_t, i == last) for i, (t, next_t) in enumerate(spans))


def integrate(
    dynamics: Dynamics,
    x_start: Float[Tensor, " batch *event"],
    *,
    solver: str,
    num_steps: int,
) -> Float[Tensor, " batch *event"]:
    """Returns the float64 state at t = 0 of the path that starts at `x_start` at t = 1."""
    x_t = x_start.double()
    for step in steps_of(solver, num_steps):
        x_t = SOLVERS[solver].step(dynamics, x_t, step)
    return x_t
