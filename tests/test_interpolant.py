import math

import pytest
import torch
from golden_sit import GOLDEN, golden_sit
from safetensors.torch import load_file

from srepa_ds.errors import ConfigError
from srepa_ds.interpolant import (
    INTERPOLANTS,
    TIME_WEIGHTINGS,
    InterpolantConfig,
    flow_loss,
    sample_time,
)
from srepa_ds.noise import NoiseStream
from srepa_ds.schema import validated

each_path = pytest.mark.parametrize("path", list(INTERPOLANTS))


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def golden_model():
    return golden_sit()


@each_path
@pytest.mark.parametrize("weighting", list(TIME_WEIGHTINGS))
@torch.no_grad()
def test_flow_loss_is_the_references(path, weighting, golden_model):
    golden = load_file(GOLDEN / "flow_loss.safetensors")
    interpolant = INTERPOLANTS[path]
    kind = {"uniform": "uniform", "lognormal": "normal"}[weighting]
    draw = golden[f"in.{kind}.{path}.{weighting}"].flatten()
    t = sample_time(TIME_WEIGHTINGS[weighting], interpolant, draw)
    sample = interpolant.noised(golden["in.x"], golden[f"in.eps.{path}.{weighting}"], t)
    prediction = golden_model(sample.x_t, sample.t, golden["in.y"]).velocity
    loss = flow_loss(prediction, sample.velocity)
    torch.testing.assert_close(loss, golden[f"out.flow.{path}.{weighting}"], rtol=1e-5, atol=1e-5)


@each_path
def test_derivatives_are_those_of_the_coefficients(path):
    t = torch.linspace(0, 1, 21, dtype=torch.float64, requires_grad=True)
    coefficients = INTERPOLANTS[path].coefficients(t)
    for value, derivative in [
        (coefficients.alpha_t, coefficients.d_alpha_t),
        (coefficients.sigma_t, coefficients.d_sigma_t),
    ]:
        (slope,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(derivative, slope, rtol=0, atol=1e-14)


@each_path
@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 1, 1), (2, 3)])
def test_coefficients_keep_the_shape_and_dtype_of_t(path, shape):
    for dtype in (torch.float32, torch.float64):
        coefficients = INTERPOLANTS[path].coefficients(torch.full(shape, 0.25, dtype=dtype))
        for value in vars(coefficients).values():
            assert value.shape == shape
            assert value.dtype == dtype


@each_path
@pytest.mark.parametrize("event", [(4, 3, 5), (7,), ()])
def test_the_ends_of_the_path_are_data_and_noise(path, event):
    x, noise = randn(2, *event), randn(2, *event, seed=1)
    sample = INTERPOLANTS[path].noised(x, noise, torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(sample.x_t[0], x[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(sample.x_t[1], noise[1], rtol=0, atol=1e-14)


def test_the_linear_velocity_is_noise_minus_data():
    x, noise = randn(3, 4, 2, 2), randn(3, 4, 2, 2, seed=1)
    sample = INTERPOLANTS["linear"].noised(x, noise, torch.tensor([0.1, 0.5, 0.9]).double())
    torch.testing.assert_close(sample.velocity, noise - x, rtol=0, atol=1e-14)


@each_path
def test_the_score_of_the_exact_velocity_is_minus_noise_over_sigma(path):
    interpolant = INTERPOLANTS[path]
    x, noise = randn(4, 3, 2, 2), randn(4, 3, 2, 2, seed=1)
    t = torch.tensor([0.04, 0.3, 0.9, 1.0], dtype=torch.float64)
    sample = interpolant.noised(x, noise, t)
    score = interpolant.score(sample.velocity, sample.x_t, t)
    sigma_t = interpolant.coefficients(t).sigma_t[:, None, None, None]
    torch.testing.assert_close(score, -noise / sigma_t, rtol=1e-12, atol=1e-12)


@each_path
def test_the_score_follows_the_general_formula(path):
    interpolant = INTERPOLANTS[path]
    velocity, x_t = randn(5, 6), randn(5, 6, seed=1)
    t = torch.linspace(0.05, 0.99, 5, dtype=torch.float64)
    c = interpolant.coefficients(t[:, None])
    ratio = c.alpha_t / c.d_alpha_t
    variance = c.sigma_t**2 - ratio * c.d_sigma_t * c.sigma_t
    expected = (ratio * velocity - x_t) / variance
    torch.testing.assert_close(
        interpolant.score(velocity, x_t, t), expected, rtol=1e-12, atol=1e-12
    )


@each_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_score_at_pure_noise_is_minus_x(path, dtype):
    velocity, x_t = 50 * randn(2, 3).to(dtype), randn(2, 3, seed=1).to(dtype)
    score = INTERPOLANTS[path].score(velocity, x_t, torch.ones(2, dtype=dtype))
    torch.testing.assert_close(score, -x_t, rtol=0, atol=5e-6)


@each_path
def test_lognormal_time_is_where_sigma_over_alpha_is_lognormal(path):
    draw = torch.linspace(-4, 4, 17, dtype=torch.float64)
    t = sample_time(TIME_WEIGHTINGS["lognormal"], INTERPOLANTS[path], draw)
    coefficients = INTERPOLANTS[path].coefficients(t)
    torch.testing.assert_close((coefficients.sigma_t / coefficients.alpha_t).log(), draw)


def test_lognormal_time_is_logit_normal_on_the_linear_path():
    draw = torch.tensor([-2.0, 0.0, 0.7])
    t = sample_time(TIME_WEIGHTINGS["lognormal"], INTERPOLANTS["linear"], draw)
    torch.testing.assert_close(t, draw.sigmoid())


@each_path
@pytest.mark.parametrize("weighting", list(TIME_WEIGHTINGS))
def test_times_lie_in_the_unit_interval_and_centre_on_a_half(path, weighting):
    row = TIME_WEIGHTINGS[weighting]
    t = sample_time(row, INTERPOLANTS[path], row.draw(0, NoiseStream.TIME, torch.arange(20_000)))
    assert 0 <= t.min()
    assert t.max() <= 1
    assert abs(t.mean() - 0.5) < 5 * t.std() / math.sqrt(len(t))
    assert t.std() > 0.15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_flow_loss_is_the_mean_over_the_event_in_float32_or_wider(dtype):
    prediction, velocity = randn(3, 4, 5, 7).to(dtype), randn(3, 4, 5, 7, seed=1).to(dtype)
    loss = flow_loss(prediction, velocity)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for sample in range(3):
        differences = prediction[sample].double() - velocity[sample].double()
        expected = (differences**2).sum() / (4 * 5 * 7)
        torch.testing.assert_close(loss[sample].double(), expected, rtol=1e-6, atol=0)


def test_unknown_names_are_refused_with_the_nearest():
    tree = {"path": "liner", "time_weighting": "lognorm"}
    with pytest.raises(ConfigError) as error:
        validated(InterpolantConfig, tree, source="test")
    assert "did you mean 'linear'?" in str(error.value)
    assert "did you mean 'lognormal'?" in str(error.value)
