import pytest
import torch
from golden_sit import GOLDEN, golden_sit
from safetensors.torch import load_file

from srepa_ds.errors import ConfigError
from srepa_ds.interpolant import INTERPOLANTS
from srepa_ds.sampling.config import SamplerConfig, count_evaluations
from srepa_ds.sampling.guidance import Guidance, GuidedModel
from srepa_ds.sampling.solvers import SOLVERS, Dynamics, integrate
from srepa_ds.schema import validated


def solve(model, x_start, labels, noise, *, solver, num_steps, guidance, path, dtype, null_label):
    guided = GuidedModel(model, labels, null_label, guidance, dtype)
    dynamics = Dynamics(guided, INTERPOLANTS[path].score, noise)
    return integrate(dynamics, x_start, solver=solver, num_steps=num_steps)


def no_noise(step):
    raise AssertionError("an ODE solver asked for noise")


# name, solver, steps, guidance, path
GOLDEN_CASES = [
    ("euler", "euler", 7, Guidance(), "linear"),
    ("euler_cfg", "euler", 7, Guidance(1.8, 0.0, 0.7), "linear"),
    ("heun_cfg", "heun", 5, Guidance(2.5, 0.2, 0.9), "linear"),
    ("em", "euler_maruyama", 9, Guidance(), "linear"),
    ("em_cfg", "euler_maruyama", 9, Guidance(1.8, 0.0, 0.7), "linear"),
    ("em_cosine", "euler_maruyama", 9, Guidance(), "cosine"),
]


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "samplers.safetensors")


@pytest.fixture(scope="module")
def model():
    sit = golden_sit()
    return lambda x_t, t, labels: sit(x_t, t, labels).velocity


@pytest.mark.parametrize(
    ("name", "solver", "num_steps", "guidance", "path"), GOLDEN_CASES, ids=lambda case: str(case)
)
@torch.no_grad()
def test_agrees_with_reference_sampler(golden, model, name, solver, num_steps, guidance, path):
    draws = golden.get(f"noise.{name}")
    result = solve(
        model,
        golden["in.noise"],
        golden["in.y"],
        no_noise if draws is None else lambda step: draws[step],
        solver=solver,
        num_steps=num_steps,
        guidance=guidance,
        path=path,
        dtype=torch.float32,
        null_label=10,
    )
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, golden[f"out.{name}"], rtol=1e-5, atol=1e-5)


def toy_velocity(x_t, t, labels):
    assert x_t.dtype == t.dtype == torch.float64
    shift = (labels % 7)[:, None, None, None].double() / 7
    return torch.tanh(0.7 * x_t) * (1 + shift) - 0.3 * t[:, None, None, None] * x_t


HIGH = Guidance(1.8, 0.0, 0.7)
ONE = Guidance()
# solver, steps, path, guidance, then sum, abs-sum, first and last of the reference code's result
TOY_CASES = [
    ("euler_maruyama", 25, "linear", ONE, 0.501415910, 10.909654819, 0.033058942, 0.016224303),
    ("euler_maruyama", 25, "linear", HIGH, 0.817063368, 15.416116736, 0.064178128, 0.065853598),
    ("euler_maruyama", 25, "cosine", ONE, 1.161081162, 20.475345655, 0.130492971, 0.094130233),
    ("euler_maruyama", 25, "cosine", HIGH, 1.638283820, 27.281613307, 0.179447370, 0.169276900),
    ("euler", 20, "linear", ONE, 2.722703997, 41.248024460, 0.282385982, 0.376715165),
    ("euler", 20, "linear", HIGH, 3.421503342, 51.856065222, 0.335325092, 0.497567861),
    ("heun", 20, "linear", ONE, 2.729434458, 41.369877251, 0.284603936, 0.377027269),
    ("heun", 20, "linear", HIGH, 3.411865771, 51.726518438, 0.336010796, 0.495229652),
]


@pytest.mark.parametrize(
    ("solver", "num_steps", "path", "guidance", "total", "magnitude", "first", "last"), TOY_CASES
)
def test_agrees_with_reference_on_a_closed_formula(
    solver, num_steps, path, guidance, total, magnitude, first, last
):
    index = torch.arange(128, dtype=torch.float64)
    calls = []

    def noise(step):
        calls.append(step)
        return torch.sin(0.9 * index + len(calls)).reshape(2, 4, 4, 4)

    result = solve(
        toy_velocity,
        torch.sin(0.31 * index + 0.7).reshape(2, 4, 4, 4),
        torch.tensor([3, 8]),
        noise,
        solver=solver,
        num_steps=num_steps,
        guidance=guidance,
        path=path,
        dtype=torch.float64,
        null_label=1000,
    ).flatten()
    found = [result.sum(), result.abs().sum(), result[0], result[-1]]
    assert [value.item() for value in found] == pytest.approx(
        [total, magnitude, first, last], abs=2e-9
    )
    assert calls == (list(range(num_steps - 1)) if solver == "euler_maruyama" else [])


def test_grid_of_the_sde():
    grid = SOLVERS["euler_maruyama"].grid(250)
    expected = [1, 0.996144578, 0.992289157, 0.047710843, 0.043855422, 0.04, 0]
    assert len(grid) == 251
    assert grid[[0, 1, 2, -4, -3, -2, -1]].tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_grids_fall_from_one_to_zero(solver):
    for num_steps in (1, 2, 7):
        grid = SOLVERS[solver].grid(num_steps)
        assert grid.dtype == torch.float64
        assert len(grid) == num_steps + 1
        assert (grid[0], grid[-1]) == (1, 0)
        assert (grid.diff() < 0).all()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_ode_solvers_converge_at_their_order(solver, order):
    x_start = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    dynamics = Dynamics(lambda x_t, t, _: -x_t * t, INTERPOLANTS["linear"].score, no_noise)
    # dx/dt = -x t from 1 to 0 multiplies x by exp(1/2).
    exact = torch.tensor(0.5, dtype=torch.float64).exp()
    errors = [
        (integrate(dynamics, x_start, solver=solver, num_steps=n) - exact).abs().item()
        for n in (64, 128)
    ]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.05)


def test_the_sde_keeps_the_marginal_of_gaussian_data():
    # Data N(0, 4): the exact velocity is known, so drift, score and diffusion are tested at once.
    generator = torch.Generator().manual_seed(0)
    shape = (20_000, 1, 1, 1)

    def velocity(x_t, t, _):
        variance = 4 * (1 - t) ** 2 + t**2
        return x_t * (t - 4 * (1 - t)) / variance

    def noise(step):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dynamics = Dynamics(velocity, INTERPOLANTS["linear"].score, noise)
    samples = integrate(dynamics, noise(0), solver="euler_maruyama", num_steps=200)
    assert samples.std().item() == pytest.approx(2.0, rel=0.03)
    assert samples.mean().item() == pytest.approx(0.0, abs=0.06)


@pytest.mark.parametrize(("high", "guided"), [(0.7, 172), (0.85, 211), (1.0, 250)])
def test_counts_evaluations_of_the_paper_settings(high, guided):
    config = SamplerConfig(cfg_scale=1.8, guidance_high=high)
    evaluations = count_evaluations(config)
    assert (evaluations.calls, evaluations.guided) == (250, guided)
    assert evaluations.total == 250 + guided


def test_counts_the_second_evaluation_of_heun():
    config = SamplerConfig(solver="heun", num_steps=10)
    assert count_evaluations(config).total == 19
    assert count_evaluations(config).guided == 0


def test_config_names_every_fault():
    tree = {"solver": "eulr", "cfg_scale": 0.5, "num_steps": 0, "label_mode": "some"}
    with pytest.raises(ConfigError, match="did you mean 'euler'") as caught:
        validated(SamplerConfig, tree, source="test")
    assert {fault.path for fault in caught.value.faults} == set(tree)


def test_config_refuses_an_empty_interval():
    with pytest.raises(ConfigError, match="guidance_low"):
        validated(SamplerConfig, {"guidance_low": 0.8, "guidance_high": 0.2}, source="test")
