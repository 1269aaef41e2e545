"""`srepa-ds parity CONFIG`: measures scores that others have published, and compares them.

It downloads nothing: `srepa-ds fetch CONFIG` does, before.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from srepa_ds.config.sections import EvaluateConfig
from srepa_ds.distributed import devices, ranks
from srepa_ds.encoders.published import local_file
from srepa_ds.evaluation.image_sets import open_images
from srepa_ds.evaluation.opening import open_evaluator
from srepa_ds.metrics.scores import METRICS, Scores, printed_names
from srepa_ds.schema import Section, one_of

_SCORES = {name: metric for metric in METRICS.values() for name in metric.fields}

Score = Annotated[str, one_of("score", _SCORES)]
"""A score that images, a reference and an extractor decide."""

Tolerance = Annotated[float, Field(ge=0)]


class ParityConfig(Section):
    """Images whose scores are published, and these scores."""

    kind: Literal["parity"]
    """Tells this file from other configurations."""
    evaluate: EvaluateConfig
    """The images, the reference and the extractor."""
    published: dict[Score, float] = Field(min_length=1)
    """The published scores; only these are measured."""
    tolerance: dict[Score, Tolerance]
    """The largest difference of each that counts as agreement."""

    @model_validator(mode="after")
    def _complete(self) -> "ParityConfig":
        if self.evaluate.samples is None or self.evaluate.draw:
            raise ValueError("evaluate.samples is required, and evaluate.draw must be false")
        if self.evaluate.further_extractors or self.evaluate.metrics is not None:
            raise ValueError(
                "evaluate.further_extractors and evaluate.metrics have no use here: `published` "
                "says what is measured; leave them out"
            )
        if self.published.keys() != self.tolerance.keys():
            names = ", ".join(sorted(self.published.keys() ^ self.tolerance.keys()))
            raise ValueError(f"published and tolerance name different scores: {names}")
        return self


@dataclass(frozen=True)
class Row:
    """A published score beside the measured one."""

    name: str
    published: float
    measured: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Returns whether the difference is within the tolerance; never for NaN."""
        return abs(self.measured - self.published) <= self.tolerance


@dataclass(frozen=True)
class Parity:
    """The table that the command prints."""

    heading: str
    rows: tuple[Row, ...]

    @property
    def agrees(self) -> bool:
        """Returns whether all scores agree."""
        return all(row.agrees for row in self.rows)

    def __str__(self) -> str:
        """Returns the heading, a line for each score, and a last line that sums up."""
        cells = [("", "published", "measured", "difference", "tolerance", "")]
        cells += [
            (
                row.name,
                f"{row.published:.5f}",
                f"{row.measured:.5f}",
                f"{row.measured - row.published:+.5f}",
                f"{row.tolerance:g}",
                "OK" if row.agrees else "off",
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = []
        for name, *numbers in cells:
            right = (cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))
            lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
        off = sum(not row.agrees for row in self.rows)
        summary = f"{off} of {len(self.rows)} are off" if off else "all agree"
        return "\n".join([self.heading, *lines, summary])


def parity(config: ParityConfig) -> Parity:
    """Returns the scores of the images of `config` beside the published ones.

    Raises DataError for images, a reference or an extractor that cannot be used, as
    `srepa-ds evaluate` does.
    """
    settings = config.evaluate
    assert settings.samples is not None
    devices.use_exact_float32()
    rank = ranks.initialize()
    path = local_file(settings.samples, setting="evaluate.samples")
    images = open_images(path, setting="evaluate.samples")
    metrics = [name for name, row in METRICS.items() if config.published.keys() & {*row.fields}]
    evaluator = open_evaluator(
        settings,
        image_shape=images.image_shape,
        count=len(images),
        rank=rank,
        metrics=metrics,
        samples=images,
    )
    scores = evaluator.measure_set(images).scores
    heading = f"{len(images):,} images of {path} against {settings.reference}"
    names = printed_names(settings.extractor.label)
    return Parity(heading, compared(config.published, config.tolerance, scores, names=names))


def compared(
    published: Mapping[str, float],
    tolerance: Mapping[str, float],
    scores: Scores,
    *,
    names: Mapping[str, str],
) -> tuple[Row, ...]:
    """Returns a row for each published score, in the order of `METRICS`; `names` are printed."""
    measured: dict[str, Any] = asdict(scores)
    return tuple(
        Row(names[name], published[name], measured[name], tolerance[name])
        for name in _SCORES
        if name in published
    )
