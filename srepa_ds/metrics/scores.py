"""Scores of a sample set: the table of metrics over features, and the result."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from srepa_ds.documents.json_reader import parse_json
from srepa_ds.errors import DataError
from srepa_ds.metrics.frechet import frechet_distance
from srepa_ds.metrics.manifold import precision_recall
from srepa_ds.metrics.statistics import FeatureStatistics

Metric = Callable[[Tensor, Tensor], Mapping[str, float]]
"""(features of the samples (n, width), of the reference (m, width)) -> fields of `Scores`."""


@dataclass(frozen=True)
class Scores:
    """The quality of a sample set; None for a score that was not measured."""

    frechet_distance: float | None = None
    """Distance between Gaussians fitted to the features; smaller is better."""
    precision: float | None = None
    """Fraction of the samples inside the reference's manifold."""
    recall: float | None = None
    """Fraction of the reference inside the samples' manifold."""
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


def _frechet(samples: Tensor, reference: Tensor) -> Mapping[str, float]:
    sets = [
        FeatureStatistics.empty(features.shape[1], device=features.device).updated(features)
        for features in (samples, reference)
    ]
    return {"frechet_distance": frechet_distance(*sets)}


def _precision_recall(samples: Tensor, reference: Tensor) -> Mapping[str, float]:
    return asdict(precision_recall(samples, reference))


METRICS: dict[str, Metric] = {
    "frechet": _frechet,
    "precision_recall": _precision_recall,
}


def score(
    samples: Float[Tensor, "samples width"],
    reference: Float[Tensor, "reference width"],
    *,
    metrics: Iterable[str] = tuple(METRICS),
    class_accuracy: float | None = None,
) -> Scores:
    """Returns the scores of `samples` against `reference` by the named rows of `METRICS`."""
    values: dict[str, float] = {}
    for name in metrics:
        values.update(METRICS[name](samples, reference))
    return Scores(class_accuracy=class_accuracy, **values)


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


def inception_score(
    logits: Float[Tensor, "samples classes"], *, split_size: int = 5000
) -> Float[Tensor, ""]:
    """Returns the mean over consecutive splits of exp(mean KL(p(y|x) || p(y))), float32.

    Without shuffling; a shorter last split counts like the others. Source: Salimans et al. (2016),
    as ADM computes it.
    """
    scores = []
    for split in logits.float().split(split_size):
        log_probabilities = split.log_softmax(dim=1)
        probabilities = log_probabilities.exp()
        log_marginal = log_probabilities.logsumexp(dim=0) - math.log(len(split))
        divergence = (probabilities * (log_probabilities - log_marginal)).sum(dim=1)
        scores.append(divergence.mean().exp())
    return torch.stack(scores).mean()
