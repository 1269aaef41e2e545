import math

import pytest
import torch
from safetensors.torch import load_file

from srepa_ds.alignment.projector import PROJECTORS, ProjectorConfig, build_projector
from srepa_ds.errors import ConfigError
from srepa_ds.schema import validated

WIDTHS = (24, 10)
GRID = (3, 4)


def built(seed=0, kind="mlp", **settings):
    generator = torch.Generator().manual_seed(seed)
    settings |= {"hidden_width": 40} if kind == "mlp" else {}
    return build_projector(ProjectorConfig(kind=kind, **settings), *WIDTHS, generator, grid=GRID)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_maps_tokens_to_the_teachers_width(kind):
    projector = built(kind=kind)
    tokens = torch.randn(2, 12, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
    projected = projector(tokens)
    assert projected.shape == (2, 12, 10)
    projected.sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in projector.parameters())


def test_has_the_keys_and_the_size_of_the_official_one():
    projector = build_projector(ProjectorConfig(), 768, 768, None, grid=(16, 16))
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
    config = ProjectorConfig(hidden_width=hidden)
    projector = build_projector(config, width_in, width_out, None, grid=GRID)
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


@pytest.mark.parametrize(
    ("kernel", "parameters"),
    [(1, {"B": 590_592, "XL": 885_504}), (3, {"B": 5_309_184, "XL": 7_963_392})],
)
def test_the_convolution_has_the_keys_and_sizes_of_irepas(kernel, parameters):
    config = ProjectorConfig(kind="conv", kernel=kernel)
    for size, width in (("B", 768), ("XL", 1152)):
        with torch.device("meta"):
            projector = build_projector(config, width, 768, None, grid=(16, 16))
        assert list(projector.state_dict()) == ["projection_layer.weight", "projection_layer.bias"]
        assert sum(weight.numel() for weight in projector.parameters()) == parameters[size]


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_the_convolution_sees_neighbours_on_the_grid_and_zeros_beyond(kernel):
    projector = built(kind="conv", kernel=kernel)
    weight, bias = projector.projection_layer.weight, projector.projection_layer.bias
    tokens = torch.randn(2, 12, 24, generator=torch.Generator().manual_seed(1))
    found = projector(tokens)
    reach = kernel // 2
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            expected = bias.expand(2, -1)
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    y, x = row + dy, column + dx
                    if 0 <= y < GRID[0] and 0 <= x < GRID[1]:
                        near = tokens[:, y * GRID[1] + x]
                        expected = expected + near @ weight[:, :, dy + reach, dx + reach].T
            torch.testing.assert_close(
                found[:, row * GRID[1] + column], expected, rtol=1e-4, atol=1e-5
            )


def test_the_convolution_starts_as_torch_leaves_it():
    projector = build_projector(
        ProjectorConfig(kind="conv"), 768, 64, torch.Generator().manual_seed(0), grid=(4, 4)
    )
    layer = projector.projection_layer
    for weight in (layer.weight, layer.bias):
        assert 0.9 * 0.012028 < weight.abs().max() <= 0.012029


@pytest.mark.parametrize("kind", PROJECTORS)
def test_takes_the_float32_stream_in_the_dtype_of_its_weights(kind):
    projector = built(kind=kind).bfloat16()
    assert projector(torch.randn(1, 12, 24)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", PROJECTORS)
def test_draws_from_its_generator_only(kind):
    before = torch.get_rng_state()
    first, again, other = (built(seed, kind=kind).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    weight = next(key for key in first if key.endswith("weight"))
    assert not torch.equal(first[weight], other[weight])
    zeros = build_projector(ProjectorConfig(kind=kind), *WIDTHS, None, grid=GRID)
    assert all(weight.abs().max() == 0 for weight in zeros.parameters())


@pytest.mark.parametrize("kind", PROJECTORS)
def test_can_be_built_without_memory(kind):
    with torch.device("meta"):
        projector = built(kind=kind)
    assert all(weight.is_meta for weight in projector.parameters())


def test_faults_of_the_configuration():
    with pytest.raises(ConfigError) as caught:
        validated(ProjectorConfig, {"kind": "mlpp", "hidden_width": 0}, source="test")
    messages = {fault.path: fault.message for fault in caught.value.faults}
    assert "did you mean 'mlp'" in messages["kind"]
    assert "greater than or equal to 1" in messages["hidden_width"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kind": "conv", "hidden_width": 64},
            "hidden_width belongs to kind 'mlp', and kind is 'conv'",
        ),
        ({"kind": "linear", "kernel": 1}, "kernel belongs to kind 'conv', and kind is 'linear'"),
        ({"kind": "conv", "kernel": 2}, "kernel 2 is even"),
    ],
)
def test_settings_of_another_kind_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        validated(ProjectorConfig, settings, source="test")
