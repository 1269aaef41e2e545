"""Frechet distances relative to those of real images (FDr), and their mean over six encoders."""

from collections.abc import Mapping
from typing import Any

VALIDATION_DISTANCES: dict[str, float] = {
    "inception": 1.68,
    "fdr-convnext": 56.87,
    "fdr-dinov2": 14.19,
    "fdr-mae": 0.04,
    "fdr-siglip": 0.60,
    "fdr-clip": 5.60,
}
"""Per extractor, the distance of ImageNet's 50,000 validation images from its training images, as
published to two decimals: that of `fdr-mae`, and so its ratio, is known to 12 % only."""

NUM_IMAGES = 50_000
"""Images that FDr is defined for; distances of fewer are larger."""


def relative_distance(extractor: str, distance: float) -> float | None:
    """Returns FDr, the distance as a multiple of the validation images'; None for other extractors.

    1 means as far from the training images as the validation images are. Comparable only for
    50,000 samples against the statistics of ImageNet's training images. Source: FD-loss
    (2604.28190).
    """
    real = VALIDATION_DISTANCES.get(extractor)
    return None if real is None else distance / real


def mean_relative_distance(distances: Mapping[str, float]) -> float | None:
    """Returns FDr6, the plain mean of FDr over the six encoders; None unless all are there.

    `distances` are Frechet distances by extractor. Source: FD-loss (2604.28190).
    """
    if not distances.keys() >= VALIDATION_DISTANCES.keys():
        return None
    ratios = [distances[name] / real for name, real in VALIDATION_DISTANCES.items()]
    return sum(ratios) / len(ratios)


def relative_distances(distances: Mapping[str, float], *, num_images: int) -> dict[str, Any]:
    """Returns `fdr`, FDr by extractor, and `fdr6`, as far as `distances` by extractor suffice.

    Empty for another number of images than FDr is defined for.
    """
    if num_images != NUM_IMAGES:
        return {}
    ratios = {name: relative_distance(name, distance) for name, distance in distances.items()}
    known = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    mean = mean_relative_distance(distances)
    return {**({"fdr": known} if known else {}), **({} if mean is None else {"fdr6": mean})}


def fdr_note(reference: str) -> str:
    """Returns what has to be said beside `relative_distances` from a reference."""
    return (
        "FDr is relative to the distance of ImageNet's validation images from all its training "
        f"images, so it can be compared only if these are the reference; here it is {reference}"
    )


def printed_ratios(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns by printed names what `relative_distances` put into a document."""
    ratios, mean = document.get("fdr"), document.get("fdr6")
    found = (
        {f"FDr-{name.removeprefix('fdr-')}": value for name, value in ratios.items()}
        if ratios
        else {}
    )
    return found if mean is None else {**found, "FDr6": mean}
