"""What iREPA and LightningDiT keep of each latent channel: scale and shift, or mean and spread."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srepa_ds.errors import CheckpointError, listed
from srepa_ds.weight_file import plain_tensors, read_weight_file

_SETTING = "the path of the statistics"
_MOST_CHANNELS = 4096

Read = Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]]
# Two names in the file -> scale and shift. LightningDiT's latents are (z - mean) / std.
_FORMS: Mapping[tuple[str, str], Read] = {
    ("latents_scale", "latents_bias"): lambda v: (v["latents_scale"], v["latents_bias"]),
    ("mean", "std"): lambda v: (1 / v["std"], v["mean"]),
}


def read_latent_statistics(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns scale and shift of each channel: a model's latents are (z - shift) x scale.

    `path` is iREPA's `sdvae-ft-mse-f8d4-latents-stats.pt` or LightningDiT's `latents_stats.pt`;
    their values are (1, c, 1, 1) or (c). Raises CheckpointError if it cannot be read without
    running code in it, is something else, or has a value that cannot scale.
    """
    found = read_weight_file(path, named=str(path), setting=_SETTING, fault=CheckpointError)
    names = next((names for names in _FORMS if names[0] in found and names[1] in found), None)
    if names is None:
        wanted = " or ".join(" and ".join(names) for names in _FORMS)
        raise CheckpointError(
            f"{path} holds no statistics of latents: it has {listed(found, most=3) or 'nothing'}, "
            f"not {wanted}; give iREPA's or LightningDiT's file"
        )
    values = _values_of(found, names, path)
    scale, shift = _FORMS[names](values)
    if not (scale.isfinite() & shift.isfinite()).all() or not (scale > 0).all():
        raise CheckpointError(
            f"{path}: {listed(names, ' or ')} has a value that cannot scale latents: all must be "
            "finite, and the scale of each channel positive; compute it again"
        )
    return _rounded(scale), _rounded(shift)


def _values_of(found: Mapping[str, Any], names: tuple[str, str], path: Path) -> dict[str, Tensor]:
    """Returns two float64 tensors of one number for each channel; raises CheckpointError."""
    tensors = {name: found[name] for name in names if isinstance(found[name], Tensor)}
    tensors = plain_tensors(tensors, path, named=str(path), fault=CheckpointError)
    values = {}
    for name in names:
        tensor = tensors.get(name)
        if tensor is None or not _is_per_channel(tensor.shape):
            form = "no tensor" if tensor is None else f"{tuple(tensor.shape)}"
            raise CheckpointError(
                f"{path}: {name} is {form}, but should be one number for each channel, (1, c, 1, "
                "1) or (c); compute it again"
            )
        values[name] = tensor.flatten().double()
    first, second = (len(value) for value in values.values())
    if first != second:
        raise CheckpointError(
            f"{path}: {names[0]} is of {first} channels and {names[1]} of {second}; compute it "
            "again"
        )
    return values


def _is_per_channel(shape: torch.Size) -> bool:
    if not 0 < shape.numel() <= _MOST_CHANNELS:
        return False
    return len(shape) == 1 or (len(shape) == 4 and shape[1] == shape.numel())


def _rounded(values: Tensor) -> tuple[float, ...]:
    """Returns numbers with the 9 digits that tell any two numbers of float32 apart."""
    return tuple(float(f"{value:.9g}") for value in values.tolist())
