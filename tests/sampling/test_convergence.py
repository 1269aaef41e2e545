"""Orders of convergence on Gaussian data, whose velocity, flow and marginals are known exactly."""

import math

import pytest
import torch

from srepa_ds.interpolant import INTERPOLANTS
from srepa_ds.sampling.solvers import SDE_LAST_TIME, SOLVERS, Dynamics, integrate

MEAN, STD = 0.7, 0.4


def coefficients(path, t):
    found = INTERPOLANTS[path].coefficients(torch.tensor(t, dtype=torch.float64))
    return found.alpha_t, found.sigma_t, found.d_alpha_t, found.d_sigma_t


def moments(path, t):
    """Returns mean and variance of x_t = alpha_t x + sigma_t noise for x of N(MEAN, STD^2)."""
    alpha, sigma, _, _ = coefficients(path, t)
    return alpha * MEAN, (alpha * STD) ** 2 + sigma**2


def exact_velocity(path):
    """Returns E[alpha_t' x + sigma_t' noise | x_t], which is affine in x_t."""

    def velocity(x_t, t, guidance_t):
        alpha, sigma, d_alpha, d_sigma = coefficients(path, t)
        mean, variance = moments(path, t)
        off = (x_t - mean) / variance
        return d_alpha * (MEAN + alpha * STD**2 * off) + d_sigma * sigma * off

    return velocity


def solved(path, solver, num_steps, x_start, noise):
    dynamics = Dynamics(exact_velocity(path), INTERPOLANTS[path].score, noise)
    return integrate(dynamics, x_start, solver=solver, num_steps=num_steps)


def slope(errors, counts):
    """Returns the order that each refinement shows."""
    pairs = zip(errors, errors[1:], counts, counts[1:], strict=False)
    return [math.log(a / b) / math.log(n / m) for a, b, m, n in pairs]


@pytest.mark.parametrize("path", INTERPOLANTS)
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_flow_of_gaussian_data_is_met_at_the_solvers_order(path, solver, order):
    x_start = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    # The flow keeps the standard score.
    start_mean, start_variance = moments(path, 1.0)
    expected = MEAN + STD * (x_start - start_mean) / start_variance.sqrt()
    counts = [40, 80, 160, 320]

    def no_noise(step):
        raise AssertionError("an ODE has no noise")

    errors = [
        (solved(path, solver, n, x_start, no_noise) - expected).abs().max().item() for n in counts
    ]
    assert errors[-1] < 0.01
    # The last of Heun's steps is one of Euler's: one step's error is of second order too.
    assert slope(errors, counts) == pytest.approx([order] * 3, abs=0.15)


def drawn_moments(path, num_steps):
    """Returns mean and variance of what Euler-Maruyama draws, exactly.

    Every step is affine, so the result is a constant plus a factor for each independent normal
    number: rows of one batch have all numbers zero, then one of them 1.
    """
    numbers = num_steps + 1
    units = torch.cat((torch.zeros(1, numbers), torch.eye(numbers))).double()
    start_mean, start_variance = moments(path, 1.0)
    start = start_mean + start_variance.sqrt() * units[:, :1]
    ends = solved(path, "euler_maruyama", num_steps, start, lambda step: units[:, 1 + step, None])
    constant, factors = ends[0], ends[1:] - ends[0]
    return constant, factors.square().sum()


def moments_after_the_last_step(path):
    """Returns the moments at 0 if those at the last time before are exact: that step stays."""
    mean, variance = moments(path, SDE_LAST_TIME)
    velocity = exact_velocity(path)
    rows = torch.stack((mean, mean + variance.sqrt()))[:, None]
    times = torch.full((2,), SDE_LAST_TIME, dtype=torch.float64)
    v = velocity(rows, SDE_LAST_TIME, SDE_LAST_TIME)
    drift = v - SDE_LAST_TIME * INTERPOLANTS[path].score(v, rows, times)
    ends = rows - SDE_LAST_TIME * drift
    return ends[0], (ends[1] - ends[0]).square().sum()


@pytest.mark.parametrize("path", INTERPOLANTS)
def test_euler_maruyama_draws_gaussian_data_at_weak_order_one(path):
    mean, variance = moments_after_the_last_step(path)
    # One step of 0.04 alone leaves the data's own moments almost as they are.
    assert abs(mean.item() - MEAN) < 0.02
    assert abs(variance.sqrt().item() - STD) < 0.02
    counts = [50, 100, 200, 400]
    found = [drawn_moments(path, n) for n in counts]
    errors = [(v - variance).abs().item() for _, v in found]
    assert errors[-1] < 0.02 * variance
    assert slope(errors, counts)[1:] == pytest.approx([1, 1], abs=0.2)
    errors = [(m - mean).abs().item() for m, _ in found]
    if path == "linear":
        # The mean moves along a straight line.
        assert max(errors) < 1e-13
    else:
        assert slope(errors, counts)[1:] == pytest.approx([1, 1], abs=0.2)


@pytest.mark.parametrize("path", INTERPOLANTS)
def test_paths_of_the_sde_converge_as_increments_are_refined(path):
    """Each solution takes sums of the finest increments, so that all follow one Brownian path.

    The diffusion does not depend on the state: Euler-Maruyama is then of strong order 1.
    """
    finest, counts = 1024, [32, 64, 128, 256]
    generator = torch.Generator().manual_seed(0)
    increments = torch.randn(finest, 200, 1, generator=generator, dtype=torch.float64)
    start_mean, start_variance = moments(path, 1.0)
    start = start_mean + start_variance.sqrt() * torch.randn(
        200, 1, generator=generator, dtype=torch.float64
    )

    def end(spans):
        by_step = increments.reshape(spans, -1, 200, 1).sum(1) / math.sqrt(finest // spans)
        # The grid has one node more than spans before the last, noiseless step.
        return solved(path, "euler_maruyama", spans + 1, start, lambda step: by_step[step])

    reference = end(finest)
    errors = [(end(spans) - reference).square().mean().sqrt().item() for spans in counts]
    assert slope(errors, counts)[0] > 0.8
    assert errors[-1] < errors[0] / 6


def test_every_solver_has_an_order_here():
    assert list(SOLVERS) == ["euler", "heun", "euler_maruyama"]
