"""Scale and shift of latent channels, as iREPA and LightningDiT keep them."""

import os
from pathlib import Path

import pytest
import torch

from srepa_ds.errors import CheckpointError
from srepa_ds.weights.foreign.latent_statistics import read_latent_statistics

MEAN, STD = torch.tensor([0.86, -0.46, 0.12, -0.2]), torch.tensor([5.5, 4.25, 4.5, 3.75])


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (4,)])
@pytest.mark.parametrize("program", ["irepa", "lightningdit"])
def test_scale_and_shift_standardise_the_latents(tmp_path, program, shape):
    path = tmp_path / "stats.pt"
    forms = {
        "irepa": {"latents_scale": 1 / STD, "latents_bias": MEAN},
        "lightningdit": {"mean": MEAN, "std": STD},
    }
    torch.save({name: value.reshape(shape) for name, value in forms[program].items()}, path)
    scale, shift = (torch.tensor(values) for values in read_latent_statistics(path))
    assert torch.equal(shift, MEAN)
    torch.testing.assert_close(scale, 1 / STD, rtol=1e-7, atol=0)
    latents = MEAN + STD * torch.randn(1000, 4)
    torch.testing.assert_close((latents - shift) * scale, (latents - MEAN) / STD)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("trace",)


FAULTS = {
    "absent": (None, "no such file; correct the path of the statistics"),
    "other names": ({"scale": STD}, "it has scale, not latents_scale and latents_bias or mean and"),
    "empty": ({}, "it has nothing, not"),
    "no tensor": ({"mean": 1.0, "std": STD}, r"mean is no tensor"),
    "a matrix": ({"mean": MEAN.reshape(2, 2), "std": STD}, r"mean is \(2, 2\), but should be"),
    "pixels": ({"mean": MEAN.reshape(1, 1, 2, 2), "std": STD}, r"mean is \(1, 1, 2, 2\), but"),
    "lengths": ({"mean": MEAN, "std": STD[:3]}, "mean is of 4 channels and std of 3"),
    "no spread": ({"mean": MEAN, "std": STD * 0}, "cannot scale latents"),
    "negative": ({"latents_scale": -STD, "latents_bias": MEAN}, "cannot scale latents"),
    "nan": ({"mean": MEAN * torch.nan, "std": STD}, "cannot scale latents"),
    "sparse": ({"mean": MEAN.to_sparse(), "std": STD}, "'mean' is a sparse tensor"),
    "code": ({"mean": MEAN, "std": Malicious()}, r"Python objects \(\w+.mkdir\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_one_message(tmp_path: Path, fault):
    content, words = FAULTS[fault]
    path = tmp_path / "stats.pt"
    if content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_latent_statistics(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
