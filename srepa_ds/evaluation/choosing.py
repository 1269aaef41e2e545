"""Chooses the metrics that an extractor, a reference and a number of images are enough for."""

from dataclasses import dataclass, field

from srepa_ds.config.sections import EvaluateConfig
from srepa_ds.encoders.extractors import ExtractorConfig
from srepa_ds.errors import DataError
from srepa_ds.evaluation.reference import ReferenceImages
from srepa_ds.metrics.scores import METRICS, check_counts

_OF_FURTHER = ("frechet", "kernel_distance")
# Without enough images for it, the others are still those of ADM's evaluator.
_LEFT_OUT = ("kernel_distance",)
# What a reference of statistics alone cannot give.
_LEFT_OUT_WITHOUT_IMAGES = ("spatial_frechet", "precision_recall", "kernel_distance")


@dataclass
class Choosing:
    """What the choice of metrics depends on, and the sentences that it leaves."""

    settings: EvaluateConfig
    reference: ReferenceImages
    count: int
    """The number of images to score."""
    asked: tuple[str, ...] | None
    """The metrics that were asked for, None for all that can be had."""
    remarks: list[str] = field(default_factory=list)
    """Why metrics are left out, or are not what they are elsewhere."""

    def metrics_of(self, config: ExtractorConfig, *, is_first: bool) -> tuple[str, ...]:
        """Returns the metrics to compute with an extractor; the first one gives the most.

        Raises DataError for metrics that were asked for and cannot be had.
        """
        is_inception = config.label == "inception"
        possible = [name for name in METRICS if _suits(name, is_inception, is_first)]
        wanted = possible if self.asked is None else [n for n in self.asked if n in possible]
        chosen = [name for name in wanted if self._can_be_had(name, config.label)]
        if is_first and (missing := [n for n in self.asked or () if n not in possible]):
            raise DataError(
                f"evaluate.metrics: {', '.join(missing)}: the extractor '{config.label}' has no "
                "such features; use the extractor inception, or leave them out"
            )
        if "spatial_frechet" in chosen and self._is_mixed():
            self.remarks.append(
                f"spatial_frechet is measured against the reference's images: "
                f"{self.reference.where} stores statistics of the pooled features (mu, sigma), and "
                "none of the spatial ones (mu_s, sigma_s)"
            )
        return tuple(chosen)

    def _can_be_had(self, name: str, label: str) -> bool:
        """Returns whether to compute a metric; notes why not, or raises DataError."""
        needs_images = self._needs_images(name, label)
        lacks_images = needs_images and self.reference.images is None
        try:
            if lacks_images:
                raise DataError(self._without_images(name, label))
            self._check_enough(name, needs_images)
        except DataError as error:
            can_miss = _LEFT_OUT_WITHOUT_IMAGES if lacks_images else _LEFT_OUT
            if self.asked is not None or name not in can_miss:
                raise
            self.remarks.append(f"{name} is left out: {error}")
            return False
        return True

    def _needs_images(self, name: str, label: str) -> bool:
        """Returns whether a metric looks at the images of the reference."""
        row = METRICS[name]
        is_stored = label == "inception" and self.reference.stored.of(row.features) is not None
        return row.takes_reference and (row.takes_rows or not is_stored)

    def _without_images(self, name: str, label: str) -> str:
        left_out = "evaluate.metrics" if self.asked is not None else "evaluate"
        what = name if label == "inception" else f"{name} of {label}"
        return (
            f"evaluate.reference: {self.reference.where} holds statistics without images, and "
            f"{what} needs images; give a reference with images, or leave it out of {left_out}"
        )

    def _check_enough(self, name: str, needs_images: bool) -> None:
        """Raises DataError unless both sets have the images that a metric needs."""
        images = self.reference.images
        # Stored statistics are of any number of images.
        real = len(images) if needs_images and images is not None else self.count
        if needs_images and METRICS[name].takes_rows:
            real = min(real, self.settings.num_manifold_images)
        check_counts([name], samples=self.count, reference=real)

    def _is_mixed(self) -> bool:
        stored = self.reference.stored
        return stored.pooled is not None and stored.spatial is None


def _suits(name: str, is_inception: bool, is_first: bool) -> bool:
    if not is_first:
        return name in _OF_FURTHER
    return is_inception or name not in ("spatial_frechet", "inception_score")
