"""The section of images: the contact sheet of the samples beside one of real images."""

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Int64
from numpy import ndarray
from PIL import Image
from torch import Tensor

from srepa_ds.data.shards import ShardDataset
from srepa_ds.errors import DataError
from srepa_ds.report.markup import Markup, element, image, or_note, png_of, section
from srepa_ds.sampling.sample_set import read_contact_sheet, read_labels
from srepa_ds.sampling.sheet import SheetBuilder

_LARGEST_SIDE = 1600
_READ_AT_ONCE = 256


def samples_section(samples: Path, open_real: Callable[[], ShardDataset]) -> Markup:
    """Returns the contact sheet of the samples beside one of real images with the same rows.

    A note replaces real images that cannot be shown. Raises DataError without a finished sample
    set.
    """
    labels = read_labels(samples)
    drawn = read_contact_sheet(samples)
    count = "images" if labels is None else f"{len(labels):,} images"
    real = or_note("real images", _real, open_real, samples, labels)
    sheets = element("div", _sheet(drawn, f"The first of {count} drawn."), real, class_="sheets")
    return section("samples", "Samples", sheets)


def _real(
    open_real: Callable[[], ShardDataset], samples: Path, drawn_labels: ndarray | None
) -> Markup:
    real = open_real()
    if drawn_labels is None:
        raise DataError(
            f"{samples} holds samples without labels; draw them with `srepa-ds sample CONFIG`"
        )
    sheet = real_sheet(real, torch.from_numpy(drawn_labels))
    return _sheet(sheet, f"Real images, from {real.folder}.")


def real_sheet(real: ShardDataset, drawn_labels: Int64[Tensor, " samples"]) -> Image.Image:
    """Returns a contact sheet of real images with the rows of a sample set of `drawn_labels`.

    Raises DataError if `real` holds none of the classes shown, or no pixels.
    """
    sheet = SheetBuilder(drawn_labels)
    labels = real.labels
    places = [(labels == label).nonzero()[:count, 0] for label, count in sheet.wanted.items()]
    chosen = torch.cat(places)
    if len(chosen) == 0:
        raise DataError(
            f"{real.folder} holds no image of the classes that were drawn; set evaluate.reference "
            "to data with these classes"
        )
    for indices in chosen.split(_READ_AT_ONCE):
        batch = real.read(indices)
        if batch.images is None:
            raise DataError(
                f"{real.folder} holds no pixels to show; set evaluate.reference to data with pixels"
            )
        sheet.add(batch.images.permute(0, 2, 3, 1).contiguous(), batch.labels)
    return sheet.image()


def _sheet(picture: Image.Image, caption: str) -> Markup:
    picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    return element(
        "figure",
        image(png_of(picture), alt=f"contact sheet: {caption}"),
        element("figcaption", f"{caption} One class per row."),
    )
