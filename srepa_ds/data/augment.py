"""Distorts small images slightly: a pure function of given random numbers."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

NUM_CHOICES = 5
"""Uniform numbers per image: rotation, size, slant, and shift in x and y."""


def distorted(
    images: Float[Tensor, "batch channels height width"],
    choices: Float[Tensor, "batch choices"],
    *,
    rotation: float,
    resize: float,
    slant: float,
    shift: float,
) -> Float[Tensor, "batch channels height width"]:
    """Returns `images` rotated, resized, slanted and shifted; `choices` are uniform in (0, 1).

    The amounts are bounds in both directions: `rotation` in radians, `resize` and `slant` relative,
    `shift` in pixels. Border pixels are repeated outwards.
    """
    angle, size, lean, right, down = (2 * choices - 1).unbind(1)
    angle, size, lean = angle * rotation, 1 + size * resize, lean * slant
    cos, sin = size * torch.cos(angle), size * torch.sin(angle)
    height, width = images.shape[2:]
    rows = (
        torch.stack((cos, lean - sin, right * shift * 2 / width), dim=1),
        torch.stack((sin, cos, down * shift * 2 / height), dim=1),
    )
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
