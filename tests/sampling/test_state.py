"""REG's sampler: the state is an image and a class token, moved together."""

import math
from itertools import pairwise

import pytest
import torch
from builders import randomised
from golden_sit import GOLDEN, golden_reg_sit
from safetensors.torch import load_file

from srepa_ds import noise
from srepa_ds.errors import ConfigError
from srepa_ds.interpolant import INTERPOLANTS
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig
from srepa_ds.noise import NoiseStream
from srepa_ds.sampling.config import SamplerConfig
from srepa_ds.sampling.guidance import Guidance, GuidedModel
from srepa_ds.sampling.solvers import SOLVERS, Dynamics, integrate
from srepa_ds.sampling.state import StateLayout, state_velocity
from srepa_ds.schema import validated

LAYOUT = StateLayout((3, 4, 2), 5)


def solve(velocity, layout, start, labels, step_noise, *, solver="euler_maruyama", **options):
    """Returns the final latents and class token; options as in GuidedModel, and num_steps."""
    num_steps, guidance = options.pop("num_steps"), options.pop("guidance")
    scales = layout.guidance_scales(guidance)
    guided = GuidedModel(velocity, labels, guidance=guidance, scales=scales, **options)
    dynamics = Dynamics(guided, INTERPOLANTS["linear"].score, step_noise)
    return layout.unpack(integrate(dynamics, start, solver=solver, num_steps=num_steps))


GOLDEN_CASES = {
    "em": Guidance(),
    "em_cfg": Guidance(2.0, 0.0, 0.8, cls_scale=1.5),
    "em_cfg_nocls": Guidance(2.0, 0.0, 0.8, cls_scale=0.0),
}


@pytest.mark.parametrize("case", GOLDEN_CASES)
@torch.no_grad()
def test_agrees_with_the_reference_sampler(case):
    golden = load_file(GOLDEN / "reg_samplers.safetensors")
    model = golden_reg_sit()
    layout = StateLayout.of(model.config)
    latents, _ = solve(
        state_velocity(model),
        layout,
        layout.pack(golden["in.noise"], golden["in.cls_noise"]),
        golden["in.y"],
        lambda step: layout.pack(
            golden[f"noise_x.{case}"][step], golden[f"noise_cls.{case}"][step]
        ),
        num_steps=8,
        guidance=GOLDEN_CASES[case],
        null_label=10,
    )
    assert latents.dtype == torch.float64
    torch.testing.assert_close(latents, golden[f"out.{case}"], rtol=1e-5, atol=1e-5)


def toy_velocity(x_t, t, labels):
    over = (slice(None),) + (None,) * (x_t.ndim - 1)
    shift = (labels % 7).double()[over] / 7
    return torch.tanh(0.7 * x_t) * (1 + shift) - 0.3 * t[over] * x_t


def test_agrees_with_the_reference_on_a_closed_formula():
    layout = StateLayout((4, 4, 4), 5)
    pixels, width = (torch.arange(n, dtype=torch.float64) for n in (128, 10))
    calls = []

    def draw(index, shape):
        calls.append(shape)
        return torch.sin(0.9 * index + len(calls)).reshape(shape)

    def step_noise(step):
        return layout.pack(draw(pixels, (2, 4, 4, 4)), draw(width, (2, 5)))

    latents, cls_token = solve(
        toy_velocity,
        layout,
        layout.pack(
            torch.sin(0.31 * pixels + 0.7).reshape(2, 4, 4, 4),
            torch.sin(0.4 * width).reshape(2, 5),
        ),
        torch.tensor([3, 8]),
        step_noise,
        num_steps=25,
        guidance=Guidance(2.3, 0.0, 0.85, cls_scale=2.3),
        null_label=1000,
        dtype=torch.float64,
    )
    flat = latents.flatten()
    found = [flat.sum().item(), flat.abs().sum().item(), flat[0].item(), flat[-1].item()]
    expected = [1.407394383, 20.125636643, 0.164405207, 0.226893786]
    assert found == pytest.approx(expected, abs=2e-9)
    assert len(calls) == 48
    assert cls_token.shape == (2, 5)


def test_what_was_packed_is_unpacked():
    latents, cls_token = torch.arange(96.0).reshape(4, 3, 4, 2), -torch.arange(20.0).reshape(4, 5)
    state = LAYOUT.pack(latents, cls_token)
    assert state.shape == (4, 29)
    for found, expected in zip(LAYOUT.unpack(state), (latents, cls_token), strict=True):
        assert torch.equal(found, expected)
    plain = StateLayout((3, 4, 2))
    found, nothing = plain.unpack(plain.pack(latents))
    assert torch.equal(found, latents)
    assert nothing is None


@pytest.mark.parametrize(("cls_scale", "applied"), [(0.0, 1.0), (0.5, 0.5), (2.5, 2.5)])
def test_each_part_is_guided_by_its_own_scale(cls_scale, applied):
    guidance = Guidance(1.7, 0.2, 0.8, cls_scale=cls_scale)
    labels, null = torch.tensor([3, 1]), 6
    state = torch.linspace(-1, 1, 58, dtype=torch.float64).reshape(2, 29)
    guided = GuidedModel(
        toy_velocity, labels, null, guidance, torch.float64, LAYOUT.guidance_scales(guidance)
    )
    t = torch.full((2,), 0.5, dtype=torch.float64)
    conditional = toy_velocity(state, t, labels)
    unconditional = toy_velocity(state, t, torch.full((2,), null))
    latents, cls_token = LAYOUT.unpack(guided(state, 0.5, 0.8))
    for found, part, scale in [
        (latents.flatten(1), slice(0, 24), 1.7),
        (cls_token, slice(24, 29), applied),
    ]:
        expected = unconditional[:, part] + scale * (conditional - unconditional)[:, part]
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    # Outside the interval both are plain.
    assert torch.equal(guided(state, 0.5, 0.81), conditional)


@pytest.mark.parametrize("cls_scale", [0.0, 3.0])
def test_the_images_scale_alone_decides_whether_there_is_guidance(cls_scale):
    assert not Guidance(1.0, cls_scale=cls_scale).active(0.5)
    assert Guidance(1.1, cls_scale=cls_scale).active(0.5)


def test_each_part_has_its_own_noise_and_the_images_is_a_plain_models():
    ids = torch.tensor([5, 2**40])
    streams = (NoiseStream.SAMPLE_STEP, NoiseStream.SAMPLE_CLS_STEP)
    options = {"draw": 3, "dtype": torch.float64}
    latents, cls_token = LAYOUT.unpack(LAYOUT.normal(7, streams, ids, **options))
    plain = StateLayout(LAYOUT.latent_shape)
    assert torch.equal(latents, plain.unpack(plain.normal(7, streams, ids, **options))[0])
    assert torch.equal(latents, noise.normal(7, streams[0], ids, (3, 4, 2), **options))
    assert torch.equal(cls_token, noise.normal(7, streams[1], ids, (5,), **options))
    assert not torch.equal(cls_token, latents.flatten(1)[:, :5])


def tiny_reg_sit():
    sizes = {"input_size": (4, 2), "in_channels": 3, "num_classes": 5, "class_token_width": 5}
    model = SiT(SiTConfig(variant="SiT-S/2", depth=1, hidden_size=24, num_heads=2, **sizes))
    return randomised(model, seed=1)


@pytest.mark.parametrize("solver", SOLVERS)
@torch.no_grad()
def test_every_solver_moves_both_parts_as_it_would_each(solver):
    """Compares with the steps of REPA's and REG's samplers, image and token apart."""
    model, labels, scale, cls_scale = tiny_reg_sit(), torch.tensor([0, 3]), 1.6, 2.2
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(2, 29, generator=generator, dtype=torch.float64)
    draws = torch.randn(6, 2, 29, generator=generator, dtype=torch.float64)
    found = solve(
        state_velocity(model),
        LAYOUT,
        start,
        labels,
        lambda step: draws[step],
        solver=solver,
        num_steps=6,
        guidance=Guidance(scale, cls_scale=cls_scale),
        null_label=5,
    )

    def velocities(x, c, t):
        of_class, of_none = (
            model(x.float(), torch.full((2,), t), y, cls_t=c.float())
            for y in (labels, torch.tensor([5, 5]))
        )
        v_x, v_c = of_none.velocity.double(), of_none.cls_velocity.double()
        return (
            v_x + scale * (of_class.velocity.double() - v_x),
            v_c + cls_scale * (of_class.cls_velocity.double() - v_c),
        )

    grid = [step / 5 * 0.04 + (1 - step / 5) for step in range(6)] + [0.0]
    grid = grid if solver == "euler_maruyama" else [1 - step / 6 for step in range(7)]
    x, c = LAYOUT.unpack(start)
    for step, (t, next_t) in enumerate(pairwise(grid)):
        dt, is_last = next_t - t, step == 5
        first = velocities(x, c, t)
        if solver == "euler_maruyama":
            drifts = [z + (2 - t) * v for z, v in zip((x, c), first, strict=True)]
            xi = [0 if is_last else math.sqrt(2 * t * -dt) * d for d in LAYOUT.unpack(draws[step])]
            x, c = x + dt * drifts[0] + xi[0], c + dt * drifts[1] + xi[1]
        elif solver == "euler" or is_last:
            x, c = x + dt * first[0], c + dt * first[1]
        else:
            second = velocities(x + dt * first[0], c + dt * first[1], next_t)
            x, c = (z + dt / 2 * (a + b) for z, a, b in zip((x, c), first, second, strict=True))
    for ours, written_out in zip(found, (x, c), strict=True):
        torch.testing.assert_close(ours, written_out, rtol=1e-5, atol=1e-5)


def test_a_negative_scale_is_refused():
    with pytest.raises(ConfigError, match="cls_cfg_scale"):
        validated(SamplerConfig, {"cls_cfg_scale": -0.1}, source="test")
    config = validated(SamplerConfig, {"cfg_scale": 2.3, "cls_cfg_scale": 1.5}, source="test")
    assert config.guidance == Guidance(2.3, 0.0, 1.0, cls_scale=1.5)


@pytest.mark.parametrize("tree", [{"cls_cfg_scale": 1.5}, {"cfg_scale": 1.0, "cls_cfg_scale": 2.3}])
def test_a_class_token_cannot_be_guided_alone(tree):
    with pytest.raises(ConfigError, match=r"(?s)1 fault.*cls_cfg_scale \(.*cfg_scale \(1\.0\)"):
        validated(SamplerConfig, tree, source="test")
    assert validated(SamplerConfig, {"cfg_scale": 1.0}, source="test").cls_cfg_scale == 0
