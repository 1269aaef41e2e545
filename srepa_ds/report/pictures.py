"""The section of images: the contact sheet of the samples beside one of real images."""

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Int64
from numpy import ndarray
from PIL import Image
from torch import Tensor

from srepa_ds.data.shards import ShardDataset
from srepa_ds.errors import DataError
from srepa_ds.evaluation.image_sets import ShardImages
from srepa_ds.evaluation.images import ImageSet
from srepa_ds.report.markup import Markup, element, image, or_note, png_of, section
from srepa_ds.sampling.image_archive import ImageArchive
from srepa_ds.sampling.sample_set import SAMPLES, read_contact_sheet
from srepa_ds.sampling.sheet import SheetBuilder

_CURE = "draw it again with `srepa-ds sample CONFIG`"
_LARGEST_SIDE = 1600
_READ_AT_ONCE = 256
_BY_CLASS = " One class per row."


def samples_section(samples: Path, open_real: Callable[[], ImageSet]) -> Markup:
    """Returns the contact sheet of the samples beside one of real images, of the same classes.

    A note replaces real images that cannot be shown. Raises DataError without a finished sample
    set.
    """
    # A set drawn into files of other kinds has no archive.
    labels = (
        ImageArchive(samples / SAMPLES, cure=_CURE).labels if (samples / SAMPLES).exists() else None
    )
    drawn = read_contact_sheet(samples)
    count = "images" if labels is None else f"{len(labels):,} images"
    real = or_note("real images", _real, open_real, samples, labels)
    sheets = element("div", _sheet(drawn, f"The first of {count} drawn."), real, class_="sheets")
    return section("samples", "Samples", sheets)


def _real(open_real: Callable[[], ImageSet], samples: Path, drawn_labels: ndarray | None) -> Markup:
    real = open_real()
    caption = f"Real images, from {real.where}."
    labels = None if drawn_labels is None else torch.from_numpy(drawn_labels)
    if not isinstance(real, ShardImages):
        sheet, by_class = sheet_of(real, labels)
        return _sheet(sheet, caption, by_class=_BY_CLASS if by_class else "")
    if labels is None:
        raise DataError(
            f"{samples} holds samples without labels; draw them with `srepa-ds sample CONFIG`"
        )
    return _sheet(real_sheet(real.dataset, labels), caption)


def sheet_of(
    real: ImageSet, drawn_labels: Int64[Tensor, " samples"] | None
) -> tuple[Image.Image, bool]:
    """Returns a contact sheet of images in the order of the set, and whether rows are classes.

    They are those of a sample set of `drawn_labels` if the images have labels too; else the first
    images are shown. Raises DataError if the set holds none of the classes.
    """
    blocks = real.blocks(_READ_AT_ONCE)
    first = next(blocks)
    rows = drawn_labels if first.labels is not None else None
    sheet = SheetBuilder(torch.zeros(1, dtype=torch.int64) if rows is None else rows)
    room = sum(sheet.wanted.values())
    for block in itertools.chain([first], blocks):
        labels = None if rows is None else block.labels
        if labels is None:
            labels = torch.zeros(len(block.images), dtype=torch.int64)
        sheet.add(block.images.permute(0, 2, 3, 1).contiguous(), labels)
        if not any(sheet.wanted.values()):
            break
    if sum(sheet.wanted.values()) == room:
        raise DataError(f"{real.where} holds no image of the classes that were drawn")
    return sheet.image(), rows is not None


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


def _sheet(picture: Image.Image, caption: str, *, by_class: str = _BY_CLASS) -> Markup:
    picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    return element(
        "figure",
        image(png_of(picture), alt=f"contact sheet: {caption}"),
        element("figcaption", caption + by_class),
    )
