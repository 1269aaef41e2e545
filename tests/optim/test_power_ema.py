"""Power-function averages: exponents, and the reconstruction of others from stored ones."""

import pytest
import torch

from srepa_ds.optim.power_ema import PowerAverage, combination, gamma_of, power_decay, sigma_of


@pytest.mark.parametrize(("sigma", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_those_of_the_paper(sigma, gamma):
    assert gamma_of(sigma) == pytest.approx(gamma, abs=0.005)
    assert sigma_of(gamma_of(sigma)) == pytest.approx(sigma, rel=1e-9)


def profile(average: PowerAverage, steps: int) -> torch.Tensor:
    """Returns the weight that an average gives to each step, from its recursion."""
    weights = torch.zeros(steps, dtype=torch.float64)
    for step in range(1, average.step + 1):
        kept = power_decay(average.gamma, step)
        weights *= kept
        weights[step - 1] = 1 - kept
    return weights


@pytest.mark.parametrize(
    ("sigma", "bound"), [(0.05, 1e-3), (0.075, 0.02), (0.1, 1e-3), (0.15, 0.04)]
)
def test_other_lengths_come_from_two_that_were_kept(sigma, bound):
    steps = 800
    stored = [
        PowerAverage(step, gamma_of(length))
        for step in range(100, steps + 1, 100)
        for length in (0.05, 0.1)
    ]
    wanted = PowerAverage(steps, gamma_of(sigma))
    factors, error = combination(stored, wanted)
    made = sum(f * profile(a, steps) for f, a in zip(factors, stored, strict=True))
    expected = profile(wanted, steps)
    found = ((made - expected).norm() / expected.norm()).item()
    assert found < bound
    # The closed form is for continuous time; this measures it in steps.
    assert error == pytest.approx(found, rel=0.1, abs=2e-3)


@pytest.mark.parametrize("sigma", [0.03, 0.05, 0.075, 0.15, 0.25])
@pytest.mark.parametrize("snapshots", [1, 2, 4, 8])
def test_the_factors_sum_to_one_and_leave_a_constant_weight_alone(snapshots, sigma):
    last = 400_000
    stored = [
        PowerAverage(last - 50_000 * back, gamma_of(length))
        for back in range(snapshots)
        for length in (0.05, 0.1)
    ]
    factors = combination(stored, PowerAverage(last, gamma_of(sigma))).factors
    assert sum(factors) == pytest.approx(1, abs=1e-12)
    weight = torch.tensor([0.1, -3.7, 1e-3], dtype=torch.float32)
    made = sum(factor * weight.double() for factor in factors)
    assert torch.equal(made.float(), weight)


def test_a_length_far_from_those_stored_is_known_by_its_error():
    stored = [PowerAverage(400_000, gamma_of(length)) for length in (0.05, 0.1)]
    errors = [
        combination(stored, PowerAverage(400_000, gamma_of(sigma))).error
        for sigma in (0.1, 0.12, 0.15, 0.2)
    ]
    assert errors == sorted(errors)
    assert errors[0] < 1e-6
    assert errors[-1] > 0.3


def test_profiles_that_do_not_overlap_are_infinitely_far():
    stored = [PowerAverage(10, gamma_of(0.05))]
    factors, error = combination(stored, PowerAverage(400_000, gamma_of(0.01)))
    assert factors == [1]
    assert error == float("inf")


def test_one_that_was_kept_is_itself():
    stored = [PowerAverage(100, gamma_of(0.05)), PowerAverage(100, gamma_of(0.1))]
    assert combination(stored, stored[1]).factors == pytest.approx([0, 1], abs=1e-6)
