"""Resampling and normalisation of patch tokens before they are compared.

Pure functions of patch tokens in row-major order, without class tokens and registers.
"""

from functools import lru_cache
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import interpolate

from srepa_ds.schema import Section, one_of

Grid = tuple[int, int]
"""Rows and columns."""

# Both smooth modes are antialiased where they shrink; where they grow, that changes nothing.
_INTERPOLATIONS: dict[str, dict[str, object]] = {
    "bilinear": {"mode": "bilinear", "align_corners": False, "antialias": True},
    "bicubic": {"mode": "bicubic", "align_corners": False, "antialias": True},
    "area": {"mode": "area"},
    "nearest": {"mode": "nearest-exact"},
}

SPATIAL_NORM_EPSILON = 1e-6


class ResamplingConfig(Section):
    """The interpolation between token grids of different sizes."""

    direction: Literal["teacher_to_student", "student_to_teacher"]
    """Which tokens are resampled: the target's to the model's grid, or the model's, after the
    projector, to the teacher's."""

    mode: Annotated[str, one_of("resampling mode", _INTERPOLATIONS)]
    """`bilinear` and `bicubic` (antialiased where they shrink), `area` (means of cells) or
    `nearest`."""


class SpatialNormConfig(Section):
    """iREPA's normalisation of the teacher's patch tokens over the image."""

    gamma: float = Field(ge=0, le=1)
    """Share of the mean token that is subtracted; iREPA's trainers: 0.6 (latents), 0.8 (pixels)."""


def resampled(
    patch_tokens: Float[Tensor, "batch tokens width"], source: Grid, target: Grid, *, mode: str
) -> Float[Tensor, "batch resampled width"]:
    """Returns the tokens of grid `source` interpolated channel by channel to grid `target`.

    Equals `torch.nn.functional.interpolate`, written as one matrix per axis: gradients are products
    too, so they are deterministic on every device. At least float32, outside autocast.
    """
    if source == target:
        return patch_tokens
    dtype = torch.promote_types(patch_tokens.dtype, torch.float32)
    rows, columns = (
        _axis_weights(old, new, mode, dtype, patch_tokens.device)
        for old, new in zip(source, target, strict=True)
    )
    with torch.autocast(patch_tokens.device.type, enabled=False):
        grid = patch_tokens.to(dtype).unflatten(1, source)
        return torch.einsum("or,pc,nrcd->nopd", rows, columns, grid).flatten(1, 2)


@lru_cache(maxsize=64)
def _axis_weights(
    old: int, new: int, mode: str, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "new old"]:
    """Returns the matrix that interpolates one axis: the interpolation of each unit vector.

    Cached on its device, because a copy in every step would make the host wait for the device.
    """
    # Along the width: torch's antialiased kernels skip the height of images one pixel wide.
    units = torch.eye(old, dtype=torch.float64)[:, None, None]
    weights = interpolate(units, size=(1, new), **_INTERPOLATIONS[mode])[:, 0, 0].T  # type: ignore[arg-type]
    return weights.to(dtype=dtype, device=device)


def spatially_normalised(
    patch_tokens: Float[Tensor, "batch tokens width"], *, gamma: float
) -> Float[Tensor, "batch tokens width"]:
    """Returns (tokens - gamma * mean) / (std + 1e-6), statistics over the tokens of each image.

    Per channel; the standard deviation is the unbiased one (iREPA's `zscore`). At least float32.
    """
    tokens = patch_tokens.to(torch.promote_types(patch_tokens.dtype, torch.float32))
    std, mean = torch.std_mean(tokens, dim=1, keepdim=True, correction=1)
    return (tokens - gamma * mean) / (std + SPATIAL_NORM_EPSILON)
