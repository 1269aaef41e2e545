"""Resampling and normalisation of token grids against torch's interpolation and loops."""

import pytest
import torch
from torch.nn.functional import interpolate

from srepa_ds.alignment.tokens import (
    ResamplingConfig,
    SpatialNormConfig,
    resampled,
    spatially_normalised,
)
from srepa_ds.errors import ConfigError
from srepa_ds.schema import validated

MODES = {
    "bilinear": {"mode": "bilinear", "antialias": True, "align_corners": False},
    "bicubic": {"mode": "bicubic", "antialias": True, "align_corners": False},
    "area": {"mode": "area"},
    "nearest": {"mode": "nearest-exact"},
}
GRIDS = [((4, 4), (7, 7)), ((16, 16), (5, 5)), ((3, 8), (6, 2)), ((1, 5), (4, 1)), ((2, 3), (2, 9))]


def tokens(grid, width=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(grid[0] * 100 + grid[1])
    return torch.randn(2, grid[0] * grid[1], width, generator=generator, dtype=dtype)


def plain(patch_tokens, source, target, mode):
    """torch's own interpolation of the grid as an image."""
    image = patch_tokens.mT.unflatten(2, source)
    return interpolate(image, size=target, **MODES[mode]).flatten(2).mT


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("source", "target"), GRIDS)
def test_equals_the_interpolation_of_an_image(mode, source, target):
    patch_tokens = tokens(source).requires_grad_()
    found = resampled(patch_tokens, source, target, mode=mode)
    expected = plain(patch_tokens, source, target, mode)
    assert found.shape == (2, target[0] * target[1], 6)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    gradients = [
        torch.autograd.grad((output * weight).sum(), patch_tokens)[0]
        for output in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_constant_grids_stay_constant_and_equal_grids_stay_themselves(mode):
    constant = torch.full((1, 12, 3), 0.7)
    found = resampled(constant, (3, 4), (5, 2), mode=mode)
    torch.testing.assert_close(found, torch.full((1, 10, 3), 0.7))
    assert resampled(constant, (3, 4), (3, 4), mode=mode) is constant


@pytest.mark.parametrize("mode", MODES)
def test_narrow_tokens_are_resampled_in_float32_whatever_autocast_says(mode):
    patch_tokens = tokens((4, 4), dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = resampled(patch_tokens, (4, 4), (3, 6), mode=mode)
    assert found.dtype == torch.float32
    expected = plain(patch_tokens.double(), (4, 4), (3, 6), mode)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_spatial_norm_gives_the_closed_form_values():
    k = torch.arange(108, dtype=torch.float64).reshape(2, 9, 6)
    normalised = spatially_normalised(torch.sin(0.71 * k + 0.2) + 0.3, gamma=0.6)
    assert normalised.sum().item() == pytest.approx(17.818165592, abs=1e-8)
    assert normalised.abs().sum().item() == pytest.approx(92.261083363, abs=1e-8)
    assert normalised[0, 0, 0].item() == pytest.approx(0.476626462, abs=1e-9)
    assert normalised[-1, -1, -1].item() == pytest.approx(1.055986714, abs=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_spatial_norm_is_per_image_and_channel(gamma, dtype):
    patch_tokens = (tokens((3, 5)) * 4 + 2).to(dtype)
    patch_tokens[1, :, 2] = 0.5
    found = spatially_normalised(patch_tokens, gamma=gamma)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for image in range(2):
        for channel in range(6):
            values = patch_tokens[image, :, channel].double()
            mean = sum(values) / 15
            std = (sum((values - mean) ** 2) / 14) ** 0.5
            expected = (values - gamma * mean) / (std + 1e-6)
            torch.testing.assert_close(
                found[image, :, channel].double(), expected, rtol=1e-4, atol=1e-5
            )


def test_faults_of_the_configuration():
    with pytest.raises(ConfigError) as caught:
        validated(ResamplingConfig, {"direction": "both", "mode": "bilinar"}, source="test")
    messages = {fault.path: fault.message for fault in caught.value.faults}
    assert "teacher_to_student" in messages["direction"]
    assert "did you mean 'bilinear'" in messages["mode"]
    with pytest.raises(ConfigError) as caught:
        validated(ResamplingConfig, {}, source="test")
    assert [fault.path for fault in caught.value.faults] == ["direction", "mode"]
    with pytest.raises(ConfigError, match=r"less than or equal to 1"):
        validated(SpatialNormConfig, {"gamma": 1.5}, source="test")
