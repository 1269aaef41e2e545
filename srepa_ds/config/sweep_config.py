"""The section `sweep`, and its points: the product of its lists."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator, model_validator

from srepa_ds.config.sections import EvaluateConfig, SampleConfig
from srepa_ds.errors import Fault, nearest
from srepa_ds.metrics.scores import METRICS
from srepa_ds.optim.ema import EmaConfig, RelativeLength, decays_of
from srepa_ds.sampling.solvers import SOLVERS
from srepa_ds.schema import Section, one_of, replaced
from srepa_ds.weights.export_config import ExportConfig

_Time = Annotated[float, Field(ge=0, le=1)]
_INCEPTION_ALONE = ("spatial_frechet", "inception_score")
_LISTS = ("num_steps", "weights", "power_sigmas", "cfg_scale", "intervals", "solver")


def _ordered(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    if low > high:
        raise ValueError(f"its first time ({low:g}) is above its last ({high:g}); swap them")
    return interval


class SweepConfig(Section):
    """The points that `srepa-ds sweep` scores: every combination of the values in these lists. A
    list that is not given has one value, that of the section `sample` or `export`."""

    num_steps: tuple[Annotated[int, Field(ge=1, lt=1 << 24)], ...] = ()
    """Steps of the solver."""

    weights: tuple[str, ...] = ()
    """Kinds of weights as in `export.weights`: `ema`, `ema-0.999`, `master`. They are taken from a
    checkpoint of the run (`export.step`) and need not be exported before."""

    power_sigmas: tuple[RelativeLength, ...] = ()
    """Relative lengths of power-function averages as in `export.power_sigma`, beside `weights`."""

    cfg_scale: tuple[Annotated[float, Field(ge=1)], ...] = ()
    """Scales of the guidance; 1 turns it off, and is drawn once for all intervals."""

    intervals: tuple[Annotated[tuple[_Time, _Time], AfterValidator(_ordered)], ...] = ()
    """First and last time that is guided (t = 1 is noise), both included: [[0, 1], [0, 0.7]]."""

    solver: tuple[Annotated[str, one_of("solver", SOLVERS)], ...] = ()
    """Names in the table of solvers."""

    num_samples: int = Field(default=10_000, ge=2)
    """Images for each point. Distances over another number of images cannot be compared."""

    metrics: tuple[Annotated[str, one_of("metric", METRICS)], ...] | None = None
    """Rows of the table of metrics; without it `frechet`, and with Inception also
    `spatial_frechet` and `inception_score`, which cost next to nothing. Points are ordered by the
    first that was measured of FID, sFID, Inception score, precision, recall, KID."""

    folder: Path | None = None
    """The folder for `sweep.json`, `sweep.md` and `sweep.html`; without it `<run.folder>/sweep`."""

    @field_validator(*_LISTS)
    @classmethod
    def _names_each_value_once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        twins = [value for value in dict.fromkeys(values) if values.count(value) > 1]
        if twins:
            raise ValueError(f"{twins[0]} is given twice; remove one")
        return values

    @field_validator("metrics")
    @classmethod
    def _measures_something(cls, values: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if values == ():
            raise ValueError("is empty, so points could not be compared; name one, or leave it out")
        return values

    @model_validator(mode="after")
    def _varies_something(self) -> "SweepConfig":
        if not any(getattr(self, name) for name in _LISTS):
            raise ValueError(f"has no points; give at least one of the lists {', '.join(_LISTS)}")
        return self

    def metrics_for(self, extractor: str) -> tuple[str, ...]:
        """Returns the metrics to compute in the feature space of an extractor's label."""
        if self.metrics is not None:
            return self.metrics
        return ("frechet", *(_INCEPTION_ALONE if extractor == "inception" else ()))


@dataclass(frozen=True)
class Point:
    """One combination of settings: the sections `sample` and `export` that draw it."""

    sample: SampleConfig
    export: ExportConfig

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the sampler that points differ in, as JSON values."""
        return {
            "solver": self.sample.solver,
            "num_steps": self.sample.num_steps,
            "cfg_scale": self.sample.cfg_scale,
            "interval": [self.sample.guidance_low, self.sample.guidance_high],
        }


def points_of(
    sweep: SweepConfig, sample: SampleConfig, export: ExportConfig
) -> tuple[tuple[Point, ...], ...]:
    """Returns the points, grouped by their weights, each combination of settings once.

    All share seed, labels and start noise. Without guidance, its interval and the scale of the
    class token's guidance mean nothing, so such a point occurs once.
    """
    sampled = list(
        itertools.product(
            sweep.solver or (sample.solver,),
            sweep.num_steps or (sample.num_steps,),
            sweep.cfg_scale or (sample.cfg_scale,),
            sweep.intervals or ((sample.guidance_low, sample.guidance_high),),
        )
    )
    groups = []
    for source, weights in _averages(sweep):
        own = replaced(export, **weights)
        changes = [_changes(*values) for values in sampled]
        distinct = [one for n, one in enumerate(changes) if one not in changes[:n]]
        common = {**source, "num_samples": sweep.num_samples}
        groups.append(tuple(Point(replaced(sample, **common, **one), own) for one in distinct))
    return tuple(groups)


def _averages(sweep: SweepConfig) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yields the changes of `sample` and of `export` for each kind of weights."""
    source = {"source": "checkpoint", "weights": None}
    for kind in sweep.weights:
        yield source, {"weights": kind, "power_sigma": None}
    for sigma in sweep.power_sigmas:
        yield source, {"power_sigma": sigma}
    if not sweep.weights and not sweep.power_sigmas:
        yield {}, {}


def _changes(
    solver: str, num_steps: int, cfg_scale: float, interval: tuple[float, float]
) -> dict[str, Any]:
    is_guided = cfg_scale > 1
    low, high = interval if is_guided else (0.0, 1.0)
    return {
        "solver": solver,
        "num_steps": num_steps,
        "cfg_scale": float(cfg_scale),
        "guidance_low": low,
        "guidance_high": high,
        **({} if is_guided else {"cls_cfg_scale": 0.0}),
    }


def sweep_is_scored(sweep: SweepConfig | None, evaluate: EvaluateConfig | None) -> Iterator[Fault]:
    """Yields the faults of a sweep whose points cannot be scored."""
    if sweep is None:
        return
    if evaluate is None:
        yield Fault("sweep", "needs a section `evaluate`: reference and extractor")
        return
    label = evaluate.extractor.label
    unknown = [name for name in sweep.metrics or () if name in _INCEPTION_ALONE]
    if unknown and label != "inception":
        yield Fault(
            "sweep.metrics",
            f"{', '.join(unknown)}: the extractor '{label}' has no such features; use the "
            "extractor inception, or leave them out",
        )


def sweep_finds_weights(sweep: SweepConfig | None, ema: EmaConfig) -> Iterator[Fault]:
    """Yields the faults of a sweep over averages that the run does not keep."""
    if sweep is None:
        return
    kept = (*decays_of(ema), "master")
    for number, kind in enumerate(sweep.weights):
        if kind not in kept:
            reason = f"the run keeps no weights '{kind}'; {nearest(kind, kept)}"
            yield Fault(f"sweep.weights.{number}", reason)
    if sweep.power_sigmas and not ema.power_sigmas:
        reason = "the run keeps no power-function averages to combine; train with ema.power_sigmas"
        yield Fault("sweep.power_sigmas", reason)


def sweep_draws(sweep: SweepConfig | None, sample: SampleConfig) -> Iterator[Fault]:
    """Yields the faults of a sweep that the section `sample` cannot draw."""
    if sweep is None:
        return
    if sample.weights is not None and (sweep.weights or sweep.power_sigmas):
        name = "weights" if sweep.weights else "power_sigmas"
        reason = "names averages in the run's checkpoints, and sample.weights other weights"
        yield Fault(f"sweep.{name}", f"{reason}; remove one of the two")
    if isinstance(sample.labels, dict) and sample.num_samples != sweep.num_samples:
        yield Fault(
            "sweep.num_samples",
            f"is {sweep.num_samples}, and sample.labels asks for {sample.num_samples} images; set "
            f"it to {sample.num_samples}, or list the classes",
        )
