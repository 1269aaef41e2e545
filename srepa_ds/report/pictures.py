"""The section of images: the contact sheet of the samples beside one of real images."""

import io
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor

from srepa_ds.data.shards import ShardDataset
from srepa_ds.errors import DataError
from srepa_ds.report.markup import Markup, element, image, png_of, section
from srepa_ds.sampling.sheet import SheetBuilder
from srepa_ds.sampling.writer import CONTACT_SHEET, SAMPLES

_LARGEST_SIDE = 1600
_READ_AT_ONCE = 256
# What a sheet can show of a class: ten columns, or all of it if there is one class.
_SHOWN_OF_EACH, _SHOWN_OF_ONE = 10, 100


def samples_section(samples: Path, real: ShardDataset | None) -> Markup:
    """Returns the sheet of the samples, and one of real images with the same rows beside it.

    Raises DataError without a finished sample set.
    """
    drawn, labels = _drawn(samples)
    sheets = [_sheet(drawn, f"The first of {len(labels):,} images drawn.")]
    if real is not None:
        sheets.append(_sheet(real_sheet(real, labels), f"Real images, from {real.folder}."))
    return section("samples", "Samples", element("div", *sheets, class_="sheets"))


def real_sheet(real: ShardDataset, drawn_labels: Int64[Tensor, "samples"]) -> Image.Image:
    """Returns a contact sheet of real images with the rows of a sample set of `drawn_labels`.

    Raises DataError if `real` holds none of these classes.
    """
    labels = real.labels
    classes = drawn_labels.unique()
    wanted = _SHOWN_OF_EACH if len(classes) > 1 else _SHOWN_OF_ONE
    chosen = torch.cat([(labels == label).nonzero()[:wanted, 0] for label in classes])
    if len(chosen) == 0:
        raise DataError(f"{real.folder} holds no image of the classes that were drawn")
    sheet = SheetBuilder(drawn_labels)
    for indices in chosen.split(_READ_AT_ONCE):
        batch = real.read(indices)
        if batch.images is None:
            raise DataError(f"{real.folder} holds no pixels to show")
        sheet.add(batch.images.permute(0, 2, 3, 1).contiguous(), batch.labels)
    return sheet.image()


def _drawn(samples: Path) -> tuple[Image.Image, Tensor]:
    try:
        picture = Image.open(io.BytesIO((samples / CONTACT_SHEET).read_bytes()))
        with np.load(samples / SAMPLES, allow_pickle=False) as archive:
            labels = torch.from_numpy(archive["arr_1"])
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{samples} is no finished sample set ({error}); draw one with `srepa-ds sample CONFIG`"
        ) from error
    return picture.convert("RGB"), labels


def _sheet(picture: Image.Image, caption: str) -> Markup:
    picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    return element(
        "figure",
        image(png_of(picture), alt=f"contact sheet: {caption}"),
        element("figcaption", f"{caption} One class per row."),
    )
