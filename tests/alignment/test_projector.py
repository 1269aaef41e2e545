import math

import pytest
import torch
from safetensors.torch import load_file

from srepa_ds.alignment.projector import PROJECTORS, ProjectorConfig, build_projector
from srepa_ds.errors import ConfigError
from srepa_ds.schema import validated

WIDTHS = (24, 10)


def built(seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    return build_projector(ProjectorConfig(hidden_width=40, **settings), *WIDTHS, generator)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_maps_tokens_to_the_teachers_width(kind):
    projector = built(kind=kind)
    tokens = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
    projected = projector(tokens)
    assert projected.shape == (2, 9, 10)
    projected.sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in projector.parameters())


def test_has_the_keys_and_the_size_of_the_official_one():
    projector = build_projector(ProjectorConfig(), 768, 768, None)
    keys = [f"{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")]
    assert list(projector.state_dict()) == keys
    assert sum(weight.numel() for weight in projector.parameters()) == 7_344_896


def test_computes_the_official_function(golden):
    state = {
        key.removeprefix("param.projectors.0."): value
        for key, value in golden.items()
        if key.startswith("param.projectors.0.")
    }
    width_in, width_out = state["0.weight"].shape[1], state["4.weight"].shape[0]
    hidden = state["0.weight"].shape[0]
    projector = build_projector(ProjectorConfig(hidden_width=hidden), width_in, width_out, None)
    projector.load_state_dict(state)
    tokens = torch.randn(2, 5, width_in, generator=torch.Generator().manual_seed(3))
    silu = [tokens]
    for layer in (0, 2, 4):
        pre = silu[-1] @ state[f"{layer}.weight"].T + state[f"{layer}.bias"]
        silu.append(pre * torch.sigmoid(pre))
    assert torch.allclose(projector(tokens), pre, atol=1e-5)


@pytest.fixture
def golden(request):
    return load_file(request.path.parents[1] / "golden" / "sit_qknorm0.safetensors")


def test_starts_xavier_uniform_with_zero_bias():
    projector = built()
    for layer in (projector[0], projector[2], projector[4]):
        bound = math.sqrt(6 / sum(layer.weight.shape))
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.mean().abs() < 0.1 * bound
        assert layer.bias.abs().max() == 0


def test_draws_from_its_generator_only():
    before = torch.get_rng_state()
    first, again, other = (built(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_can_be_built_without_memory():
    with torch.device("meta"):
        projector = built()
    assert all(weight.is_meta for weight in projector.parameters())


def test_faults_of_the_configuration():
    with pytest.raises(ConfigError) as caught:
        validated(ProjectorConfig, {"kind": "mlpp", "hidden_width": 0}, source="test")
    messages = {fault.path: fault.message for fault in caught.value.faults}
    assert "did you mean 'mlp'" in messages["kind"]
    assert "greater than or equal to 1" in messages["hidden_width"]
