"""The spatial structure of tokens, layer by layer, and the page that shows it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from srepa_ds.errors import DataError
from srepa_ds.metrics.structure import (
    correlation_decay_slope,
    local_distant_similarity,
    region_self_similarity,
    spatial_contrast,
)
from srepa_ds.report.markup import Markup, element, joined, note, section, table

MEASURES = {
    "lds": "how much more alike adjacent tokens are than distant ones",
    "cds": "by how much similarity falls per token of distance",
    "srss": "how much more alike foreground is to near foreground than to far background",
    "rmsc": "the root mean square distance of the tokens from their mean",
}


@dataclass
class Layer:
    """The measures of one layer's tokens, added up image by image."""

    teacher: str
    """The teacher, or the one that the student's block was aligned with."""
    name: str
    grid: tuple[int, int]
    values: dict[str, list[Tensor]] = field(default_factory=lambda: {k: [] for k in MEASURES})

    def add(
        self,
        tokens: Float[Tensor, "images tokens width"],
        masks: Bool[Tensor, "images tokens"] | None,
        has_regions: Bool[Tensor, " images"] | None,
    ) -> None:
        """Adds images; SRSS is NaN without `masks`, and where regions are too small.

        Raises DataError for tokens that are not finite.
        """
        if not tokens.isfinite().all():
            raise DataError(
                f"tokens of {self.name} ({self.teacher}) hold NaN or infinity; check the images "
                "and the weights"
            )
        nothing = torch.full((len(tokens),), torch.nan)
        found = {
            "lds": local_distant_similarity(tokens, self.grid),
            "cds": correlation_decay_slope(tokens, self.grid),
            "srss": nothing,
            "rmsc": spatial_contrast(tokens),
        }
        if masks is not None and has_regions is not None:
            masks, has_regions = masks.to(tokens.device), has_regions.to(tokens.device)
            similarity = region_self_similarity(tokens, masks, self.grid)
            found["srss"] = similarity.where(has_regions, torch.nan)
        for name, values in found.items():
            self.values[name].append(values.cpu())

    def means(self) -> dict[str, float | None]:
        """Returns the mean of each measure over the images that have it; None without any."""
        per_measure = {name: torch.cat(values) for name, values in self.values.items()}
        means = {name: values.double().nanmean().item() for name, values in per_measure.items()}
        return {name: mean if mean == mean else None for name, mean in means.items()}

    def document(self) -> dict[str, Any]:
        """Returns the layer's means, and the number of images behind each, as JSON values."""
        images = {k: int(torch.cat(v).isfinite().sum()) for k, v in self.values.items()}
        grid = list(self.grid)
        return {
            "teacher": self.teacher,
            "layer": self.name,
            "grid": grid,
            "means": self.means(),
            "images": images,
        }


def rows_of(layers: Iterable[Layer]) -> list[tuple[str, ...]]:
    """Returns a row per layer: its name, its grid and its measures, as text."""
    return [
        (
            layer.name if layer.name == layer.teacher else f"{layer.name} ({layer.teacher})",
            f"{layer.grid[0]} x {layer.grid[1]}",
            *("-" if mean is None else f"{mean:.4f}" for mean in layer.means().values()),
        )
        for layer in layers
    ]


HEADER = ("tokens", "grid", *(name.upper() for name in MEASURES))


def structure_section(layers: Iterable[Layer], notes: Iterable[str], *, images: int) -> Markup:
    """Returns the table of all layers, with what each measure means."""
    text = "; ".join(f"{name.upper()}: {meaning}" for name, meaning in MEASURES.items())
    intro = f"Means over {images:,} images, of cosine similarities on the grid of tokens. {text}."
    return section(
        "structure",
        "Spatial structure",
        joined(*map(note, notes)),
        table(rows_of(layers), header=HEADER),
        element("p", intro, class_="soft"),
    )
