"""Masks of foreground, one PNG per image, on the grid of a teacher's tokens."""

from pathlib import Path, PurePosixPath

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from srepa_ds.errors import DataError
from srepa_ds.files import reason_of

_SIDE = 256
"""Masks are brought to this size before they are pooled, as iREPA's script does."""
_SHARE = 4
"""Regions count with at least 64 of 16 x 16 patches, a quarter of any grid."""
_MODES = frozenset({"1", "L", "P", "I", "I;16", "I;16B", "F"})


def find_mask(folder: Path, *, key: str, index: int) -> Path | None:
    """Returns the mask of an image by its key in the source, or by its index; None without.

    Raises DataError if the folder cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of masks; set structure.masks to one")
    # A key may be that of another system: it must stay inside the folder.
    name = PurePosixPath(key)
    is_inside = not name.is_absolute() and ".." not in name.parts and name.name != ""
    names = [str(name.with_suffix(".png"))] if is_inside else []
    return next((p for n in (*names, f"{index}.png") if (p := folder / n).is_file()), None)


def read_mask(path: Path, grid: tuple[int, int]) -> Bool[Tensor, " tokens"]:
    """Returns which tokens of a row-major grid hold foreground: any pixel above 0.

    As iREPA's script: resized to 256 px by Pillow's default, compared with 0, max-pooled. Raises
    DataError for a file that cannot be decoded, or that has several channels.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode not in _MODES:
                raise DataError(
                    f"{path}: is a {picture.mode} picture, but a mask has one channel; save it in "
                    "grey"
                )
            values = np.asarray(picture.resize((_SIDE, _SIDE)))
    # Pillow's readers raise many kinds of errors for damaged files.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as a mask: {reason_of(error)}") from error
    inside = torch.from_numpy(values > 0).float()
    return adaptive_max_pool2d(inside[None, None], grid).flatten() > 0


def has_both_regions(masks: Bool[Tensor, "images tokens"]) -> Bool[Tensor, " images"]:
    """Returns which masks have a quarter of the tokens or more of foreground and of background."""
    inside, number = masks.sum(dim=1), masks.shape[1]
    return (_SHARE * inside >= number) & (_SHARE * (number - inside) >= number)
