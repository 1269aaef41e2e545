"""Scores of a sample set: the table of metrics over features, and the result."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Literal, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from srepa_ds.documents.json_reader import parse_json
from srepa_ds.errors import DataError
from srepa_ds.metrics.distances import Arithmetic
from srepa_ds.metrics.frechet import frechet_distance
from srepa_ds.metrics.inception_score import SPLIT_SIZE, inception_score
from srepa_ds.metrics.kernel_distance import (
    NUM_SUBSETS,
    SUBSET_SIZE,
    check_subset_size,
    kernel_distance,
)
from srepa_ds.metrics.manifold import NUM_NEIGHBOURS, check_count, precision_recall
from srepa_ds.metrics.statistics import FeatureStatistics

_BATCH = 1024
"""Rows that become float64 at once."""

FeatureKind = Literal["pooled", "spatial", "logits"]


@dataclass(frozen=True)
class Scores:
    """The quality of a sample set; None for a score that was not measured."""

    frechet_distance: float | None = None
    """Distance between Gaussians fitted to the features; smaller is better."""
    spatial_frechet_distance: float | None = None
    """The same over features of every position; smaller is better."""
    inception_score: float | None = None
    """How certain and how varied the classifier's predictions are; larger is better."""
    precision: float | None = None
    """Fraction of the samples inside the reference's manifold."""
    recall: float | None = None
    """Fraction of the reference inside the samples' manifold."""
    kernel_distance: float | None = None
    """Squared maximum mean discrepancy of the features; smaller is better, may fall below 0."""
    class_accuracy: float | None = None
    """Fraction of the samples that a classifier assigns to the class asked for."""

    def to_json(self) -> str:
        """Returns the measured scores as a JSON object."""
        return json.dumps({k: v for k, v in asdict(self).items() if v is not None}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Scores":
        """Returns the scores of a JSON object; raises DataError for any other text."""
        try:
            values = parse_json(text)
        except ValueError as error:
            raise DataError(f"scores are not JSON: {error}") from error
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not known.issuperset(values):
            raise DataError(f"scores must be an object with keys among {', '.join(sorted(known))}")
        if not all(type(value) in (int, float) for value in values.values()):
            raise DataError("scores must be numbers")
        return cls(**{name: float(value) for name, value in values.items()})


SMALLER_IS_BETTER: dict[str, bool] = {
    "frechet_distance": True,
    "spatial_frechet_distance": True,
    "inception_score": False,
    "precision": False,
    "recall": False,
    "kernel_distance": True,
    "class_accuracy": False,
}
"""The direction of each field of `Scores`."""


def printed_names(extractor: str) -> dict[str, str]:
    """Returns the name of each field of `Scores` in tables, for an extractor's label.

    Only Inception's features give the FID, sFID, IS and KID; other encoders give "FD-dinov2-b".
    """
    own = extractor == "inception"
    return {
        "frechet_distance": "FID" if own else f"FD-{extractor}",
        "spatial_frechet_distance": "sFID" if own else f"sFD-{extractor}",
        "inception_score": "IS" if own else f"IS-{extractor}",
        "precision": "precision",
        "recall": "recall",
        "kernel_distance": "KID" if own else f"KD-{extractor}",
        "class_accuracy": "class accuracy",
    }


@dataclass(frozen=True)
class Conventions:
    """What two evaluations must share for their scores to be comparable."""

    arithmetic: Arithmetic = "fp32"
    """Of the distances for precision and recall; "fp16" is ADM's."""
    split_size: int = SPLIT_SIZE
    """Images per split of the inception score."""
    num_subsets: int = NUM_SUBSETS
    """Of the kernel distance."""
    subset_size: int = SUBSET_SIZE
    """Images of each set in a subset of the kernel distance."""


@dataclass(frozen=True)
class FeatureSet:
    """One kind of features of a set of images, as far as it was collected."""

    statistics: FeatureStatistics | None = None
    rows: Float[Tensor, "images width"] | None = None
    """In the order of the images' indices."""

    def need_statistics(self) -> FeatureStatistics:
        """Returns the statistics, from the rows if only these were collected."""
        if self.statistics is not None:
            return self.statistics
        rows = self.need_rows()
        statistics = FeatureStatistics.empty(rows.shape[1], device=rows.device)
        for batch in rows.split(_BATCH):
            statistics = statistics.updated(batch)
        return statistics

    def need_rows(self) -> Tensor:
        """Returns the rows, which must have been collected."""
        assert self.rows is not None, "this metric takes every image's features"
        return self.rows


Collected = Mapping[FeatureKind, FeatureSet]
"""The features of a set of images, by kind."""


class Measured(NamedTuple):
    """Scores, and which samples lie inside the reference's manifold."""

    scores: Scores
    in_reference: Bool[Tensor, " samples"] | None
    """None if precision was not measured; see `manifold.precision_by_class`."""


class _Outcome(NamedTuple):
    values: Mapping[str, float]
    in_reference: Tensor | None = None


@dataclass(frozen=True)
class Metric:
    """A row of `METRICS`."""

    fields: tuple[str, ...]
    """The fields of `Scores` that it fills."""
    features: FeatureKind
    """The features that it takes."""
    takes_rows: bool
    """Whether it takes every image's features, in the order of the index; else statistics do."""
    takes_reference: bool
    """Whether it compares with real images."""
    compute: Callable[[FeatureSet, FeatureSet, Conventions], _Outcome] = field(repr=False)
    """(the samples' features, the reference's, conventions) -> values of its fields."""
    check: Callable[[str, int, Conventions], None] = field(repr=False)
    """(name of a set, its number of images, conventions): raises DataError for too few."""


def _frechet(name: str, kind: FeatureKind) -> Metric:
    def compute(samples: FeatureSet, reference: FeatureSet, _: Conventions) -> _Outcome:
        sets = samples.need_statistics(), reference.need_statistics()
        return _Outcome({name: frechet_distance(*sets)})

    def check(set_name: str, count: int, _: Conventions) -> None:
        if count < 2:
            raise DataError(f"a Frechet distance needs at least 2 {set_name} images, got {count}")

    return Metric((name,), kind, False, True, compute, check)


def _precision_recall(
    samples: FeatureSet, reference: FeatureSet, conventions: Conventions
) -> _Outcome:
    found = precision_recall(
        samples.need_rows(), reference.need_rows(), arithmetic=conventions.arithmetic
    )
    values = {"precision": found.precision, "recall": found.recall}
    return _Outcome(values, found.in_reference)


def _inception_score(samples: FeatureSet, _: FeatureSet, conventions: Conventions) -> _Outcome:
    value = inception_score(samples.need_rows(), split_size=conventions.split_size)
    return _Outcome({"inception_score": value.item()})


def _check_inception_score(name: str, count: int, _: Conventions) -> None:
    if count < 1:
        raise DataError(f"the inception score needs at least 1 {name} image, got {count}")


def _kernel_distance(
    samples: FeatureSet, reference: FeatureSet, conventions: Conventions
) -> _Outcome:
    value = kernel_distance(
        samples.need_rows(),
        reference.need_rows(),
        num_subsets=conventions.num_subsets,
        subset_size=conventions.subset_size,
    )
    return _Outcome({"kernel_distance": value})


def _check_kernel_distance(name: str, count: int, conventions: Conventions) -> None:
    check_subset_size(name, count, subset_size=conventions.subset_size)


def _check_precision_recall(name: str, count: int, _: Conventions) -> None:
    check_count(name, count, num_neighbours=NUM_NEIGHBOURS)


METRICS: dict[str, Metric] = {
    "frechet": _frechet("frechet_distance", "pooled"),
    "spatial_frechet": _frechet("spatial_frechet_distance", "spatial"),
    "inception_score": Metric(
        ("inception_score",), "logits", True, False, _inception_score, _check_inception_score
    ),
    "precision_recall": Metric(
        ("precision", "recall"), "pooled", True, True, _precision_recall, _check_precision_recall
    ),
    "kernel_distance": Metric(
        ("kernel_distance",), "pooled", True, True, _kernel_distance, _check_kernel_distance
    ),
}


def check_counts(
    metrics: Iterable[str],
    *,
    samples: int,
    reference: int,
    conventions: Conventions | None = None,
) -> None:
    """Checks that both sets have the images that the named metrics need; raises DataError."""
    for name in metrics:
        row = METRICS[name]
        sets = [("sample", samples)] + [("reference", reference)] * row.takes_reference
        for set_name, count in sets:
            row.check(set_name, count, conventions or Conventions())


def measure(
    samples: Collected,
    reference: Collected,
    *,
    metrics: Iterable[str],
    class_accuracy: float | None = None,
    conventions: Conventions | None = None,
) -> Measured:
    """Returns the scores of `samples` against `reference` by the named rows of `METRICS`.

    Raises DataError for too few images or features that are not finite.
    """
    values: dict[str, float] = {}
    in_reference = None
    for name in metrics:
        row = METRICS[name]
        other = reference[row.features] if row.takes_reference else FeatureSet()
        outcome = row.compute(samples[row.features], other, conventions or Conventions())
        values.update(outcome.values)
        in_reference = in_reference if outcome.in_reference is None else outcome.in_reference
    return Measured(Scores(class_accuracy=class_accuracy, **values), in_reference)


def score(
    samples: Float[Tensor, "samples width"],
    reference: Float[Tensor, "reference width"],
    *,
    metrics: Iterable[str] = ("frechet", "precision_recall"),
    class_accuracy: float | None = None,
) -> Scores:
    """Returns the scores of pooled features against a reference's by rows of `METRICS`."""
    return measure(
        {"pooled": FeatureSet(rows=samples)},
        {"pooled": FeatureSet(rows=reference)},
        metrics=metrics,
        class_accuracy=class_accuracy,
    ).scores


def notes_on(*, samples: int, reference: int, width: int) -> list[str]:
    """Returns a sentence for each set with too few images for the distance to mean anything.

    The covariance of n images has a rank below n, so that of few is not the distribution's.
    """
    return [
        f"{count:,} {name} for features of width {width:,}: at least {width + 1:,} are needed for "
        "a covariance of full rank; Frechet distances over so few cannot be compared"
        for name, count in (("drawn images", samples), ("real images", reference))
        if count <= width
    ]
