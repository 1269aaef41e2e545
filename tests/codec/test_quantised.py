"""Pixels of decoded values, as the reference programs make them."""

import pytest
import torch
from places import GOLDEN
from safetensors.torch import load_file
from small_vae import opened, write_vae

from srepa_ds.codec.identity import IdentityCodec
from srepa_ds.codec.quantised import BrokenImagesError, quantised, refuse_broken_rows


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "sit_original.safetensors")


@pytest.mark.parametrize(("rounding", "name"), [("truncate", "repa"), ("round", "sit")])
def test_pixels_are_those_of_the_reference(golden, rounding, name):
    assert torch.equal(quantised(golden["pixels.in"], rounding), golden[f"pixels.{name}"])


def test_the_two_roundings_differ_in_half_of_all_pixels():
    values = torch.linspace(-0.99, 0.99, 9_999).reshape(1, 3, 3, -1)
    cut, rounded = (quantised(values, rounding).int() for rounding in ("truncate", "round"))
    assert set((rounded - cut).unique().tolist()) == {0, 1}
    assert ((rounded - cut).float().mean() - 0.5).abs() < 0.01


def test_halves_are_rounded_up():
    halves = torch.tensor([0.5, 1.5, 2.5, 3.5]) / 127.5 - 1
    pixels = quantised(halves.reshape(1, 1, 2, 2).expand(1, 3, 2, 2), "round")
    assert pixels[..., 0].flatten().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_found_by_row(value):
    values = torch.zeros(4, 3, 2, 2)
    refuse_broken_rows(values, "latents")
    values[1, 2, 0, 1] = values[3, 0, 1, 1] = value
    with pytest.raises(BrokenImagesError, match=r"the latents of image\(s\) \[1, 3\]") as caught:
        refuse_broken_rows(values, "latents")
    assert caught.value.rows == [1, 3]


def test_codecs_look_for_broken_pixels_only_if_asked(tmp_path):
    vae = opened(write_vae(tmp_path / "vae"), batch_size=2)
    for codec, latents in (
        (IdentityCodec(), torch.zeros(5, 3, 8, 8)),
        (vae, torch.zeros(5, 4, 8, 8)),
    ):
        whole = codec.decode(latents, refuse_broken=True)
        assert torch.equal(whole, codec.decode(latents))
        latents[3, 0, 0, 0] = float("nan")
        codec.decode(latents)
        with pytest.raises(BrokenImagesError) as caught:
            codec.decode(latents, refuse_broken=True)
        assert caught.value.rows == [3]
