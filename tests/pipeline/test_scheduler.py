"""The solvers as a scheduler of diffusers, driven as its pipelines do."""

import copy

import pytest
import torch
from golden_sit import GOLDEN, golden_sit
from safetensors.torch import load_file

from srepa_ds.errors import ConfigError
from srepa_ds.interpolant import INTERPOLANTS
from srepa_ds.pipeline import SiTFlowMatchScheduler
from srepa_ds.sampling.guidance import Guidance, GuidedModel
from srepa_ds.sampling.solvers import SOLVERS, Dynamics, integrate

# name, solver, steps, guidance, path
GOLDEN_CASES = [
    ("euler", "euler", 7, Guidance(), "linear"),
    ("euler_cfg", "euler", 7, Guidance(1.8, 0.0, 0.7), "linear"),
    ("heun_cfg", "heun", 5, Guidance(2.5, 0.2, 0.9), "linear"),
    ("em", "euler_maruyama", 9, Guidance(), "linear"),
    ("em_cfg", "euler_maruyama", 9, Guidance(1.8, 0.0, 0.7), "linear"),
    ("em_cosine", "euler_maruyama", 9, Guidance(), "cosine"),
]


def toy_velocity(x_t, t, guidance_t):
    """Returns a velocity in REPA's convention."""
    return torch.tanh(0.7 * x_t) * (1 + t) - 0.3 * guidance_t * x_t


def solved(scheduler, velocity, state, draws=None):
    """Returns the last state, with a model in SiT's convention of this velocity (REPA's)."""
    for call, timestep in zip(scheduler.calls, scheduler.timesteps, strict=True):
        assert timestep.item() == pytest.approx(1 - call.t, abs=1e-7)
        output = -velocity(state, call.t, call.step.t)
        noise = draws[call.step.index] if call.draws else None
        state = scheduler.step(output, timestep, state, variance_noise=noise).prev_sample
    return state


@pytest.mark.parametrize(("name", "solver", "num_steps", "guidance", "path"), GOLDEN_CASES)
@torch.no_grad()
def test_agrees_with_reference_sampler(name, solver, num_steps, guidance, path):
    golden = load_file(GOLDEN / "samplers.safetensors")
    sit = golden_sit()
    guided = GuidedModel(
        lambda x_t, t, labels: sit(x_t, t, labels).velocity, golden["in.y"], 10, guidance
    )
    scheduler = SiTFlowMatchScheduler(solver=solver, path=path)
    scheduler.set_timesteps(num_steps)
    state = golden["in.noise"].double()
    result = solved(scheduler, guided, state, golden.get(f"noise.{name}"))
    torch.testing.assert_close(result, golden[f"out.{name}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", INTERPOLANTS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 2, 9])
def test_states_equal_the_solvers_to_the_bit(solver, path, num_steps):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64)
    draws = torch.randn(num_steps, *start.shape, generator=generator, dtype=torch.float64)
    scheduler = SiTFlowMatchScheduler(solver=solver, path=path)
    scheduler.set_timesteps(num_steps)
    dynamics = Dynamics(toy_velocity, INTERPOLANTS[path].score, lambda step: draws[step])
    expected = integrate(dynamics, start, solver=solver, num_steps=num_steps)
    assert torch.equal(solved(scheduler, toy_velocity, start, draws), expected)
    # Once more: nothing of the first solution is left.
    scheduler.set_timesteps(num_steps)
    assert torch.equal(solved(scheduler, toy_velocity, start, draws), expected)


def test_calls_of_heun():
    scheduler = SiTFlowMatchScheduler(solver="heun")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    assert scheduler.order == 2
    assert SiTFlowMatchScheduler().order == 1
    assert scheduler.init_noise_sigma == 1.0


def test_states_keep_their_dtype_and_noise_comes_from_a_generator():
    results = []
    for seed in (1, 1, 2):
        scheduler = SiTFlowMatchScheduler(solver="euler_maruyama")
        scheduler.set_timesteps(3)
        state = torch.ones(2, 1, 2, 2)
        generator = torch.Generator().manual_seed(seed)
        for timestep in scheduler.timesteps:
            seen = scheduler.scale_model_input(state, timestep)
            (state,) = scheduler.step(seen, timestep, state, generator=generator, return_dict=False)
            assert state.dtype == torch.float32
        results.append(state)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_copy_goes_on_by_itself():
    scheduler = SiTFlowMatchScheduler(solver="heun")
    scheduler.set_timesteps(3)
    state = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    state = scheduler.step(state, scheduler.timesteps[0], state).prev_sample
    other = copy.deepcopy(scheduler)
    ends = []
    for one in (scheduler, other):
        x_t = state
        for timestep in one.timesteps[1:]:
            x_t = one.step(x_t, timestep, x_t).prev_sample
        ends.append(x_t)
    assert torch.equal(*ends)


def test_saved_and_loaded(tmp_path):
    SiTFlowMatchScheduler(solver="euler_maruyama", path="cosine").save_pretrained(tmp_path)
    loaded = SiTFlowMatchScheduler.from_pretrained(tmp_path)
    assert (loaded.config.solver, loaded.config.path) == ("euler_maruyama", "cosine")
    changed = SiTFlowMatchScheduler.from_config(loaded.config, solver="heun")
    assert (changed.config.solver, changed.config.path) == ("heun", "cosine")


def test_wrong_uses_are_named():
    with pytest.raises(ConfigError, match="did you mean 'euler'") as caught:
        SiTFlowMatchScheduler(solver="eulr", path="line")
    assert [fault.path for fault in caught.value.faults] == ["solver", "path"]
    scheduler = SiTFlowMatchScheduler()
    state = torch.ones(1, 1, 2, 2)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(state, 0.0, state)
    with pytest.raises(ValueError, match="at least 1"):
        scheduler.set_timesteps(0)
    scheduler.set_timesteps(1)
    scheduler.step(state, 0.0, state)
    with pytest.raises(ValueError, match="no step left"):
        scheduler.step(state, 0.0, state)
