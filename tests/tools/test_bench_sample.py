"""The benchmark of sampling: its plain loop draws what the sampler draws."""

import importlib
import subprocess
import sys

import pytest
import torch
from builders import randomised
from places import ROOT

from srepa_ds.interpolant import INTERPOLANTS
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig
from srepa_ds.sampling.guidance import Guidance, GuidedModel
from srepa_ds.sampling.solvers import Dynamics, integrate

TOOL = ROOT / "tools" / "bench_sample.py"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(TOOL.parent)
    return importlib.import_module


@pytest.mark.parametrize("scale", [1.8, 1.0])
def test_the_plain_loop_draws_the_images_of_the_sampler(tool, monkeypatch, scale):
    sizes = {"input_size": 4, "in_channels": 4, "num_classes": 5}
    config = SiTConfig(variant="SiT-S/2", depth=1, hidden_size=24, num_heads=2, **sizes)
    model, labels = randomised(SiT(config), seed=1), torch.tensor([3, 0, 1])
    sizes_of_batches = []
    model.register_forward_pre_hook(lambda _, given: sizes_of_batches.append(len(given[0])))
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, 4, 4, generator=generator)
    draws = torch.randn(6, 3, 4, 4, 4, generator=generator, dtype=torch.float64)
    plain, rows = tool("plain_sampler"), iter(draws)
    monkeypatch.setattr(plain.torch, "randn", lambda *shape, device: start)
    monkeypatch.setattr(plain.torch, "randn_like", lambda state: next(rows))
    found = plain.plain_batch(model, labels, num_steps=6, cfg_scale=scale, dtype=torch.float32)
    assert sizes_of_batches == [6 if scale > 1 else 3] * 6

    def velocity(x_t, t, labels):
        return model(x_t, t, labels).velocity

    guided = GuidedModel(velocity, labels, 5, Guidance(scale))
    with torch.no_grad():
        expected = integrate(
            Dynamics(guided, INTERPOLANTS["linear"].score, lambda step: draws[step]),
            start,
            solver="euler_maruyama",
            num_steps=6,
        )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_tool_prints_a_row_for_each_way():
    command = [sys.executable, TOOL, "--model", "SiT-S/2", "--images", "4", "--steps", "4"]
    command += ["--latents", "8", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    header, _, plain, ours = done.stdout.splitlines()
    assert "SiT-S/2" in header
    assert plain.startswith("plain loop")
    assert plain.endswith("1.00x")
    assert ours.startswith("srepa_ds")
