"""`srepa-ds sweep`: scores of a run over steps, weights, guidance scale and interval; resumable."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from srepa_ds.commands.scoring import compare_small, drawn_blocks
from srepa_ds.config.experiment import Config
from srepa_ds.config.sections import EvaluateConfig
from srepa_ds.config.sweep_config import Point, SweepConfig, points_of
from srepa_ds.distributed import devices, ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.drawing.drawing import Drawing, open_drawing
from srepa_ds.drawing.varied import with_sampler
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.evaluation.first_images import FirstImages
from srepa_ds.evaluation.opening import open_evaluator
from srepa_ds.evaluation.point_scorer import PointScorer
from srepa_ds.files import claimed
from srepa_ds.report.sweep_files import CURE, publish
from srepa_ds.sampling.config import SamplerConfig, count_evaluations
from srepa_ds.schema import replaced

log = logging.getLogger("srepa_ds")

_SHOWN = 16
"""Images of each point that the page shows."""


def sweep(config: Config) -> Path:
    """Returns the folder with `sweep.json`, `sweep.md` and `sweep.html`: a row for each point.

    Runs on every rank. A point that was scored before, with the same weights and settings and
    against the same reference, is kept; a kill loses at most one. Raises SRepaError on all ranks
    alike, ConfigError without the sections `sweep` and `evaluate`.
    """
    settings, _ = _sections(config)
    groups = points_of(settings, config.sample, config.export)
    devices.use_exact_float32()
    rank = ranks.initialize()
    folder = settings.folder or config.run_folder.sweep
    scorer: PointScorer | None = None
    with ExitStack() as stack:
        for group in groups:
            drawing = _open(config, group, rank)
            if scorer is None:
                ranks.together(stack.enter_context, _claimed(folder, is_main=rank.is_main))
                scorer = _scorer(config, groups, folder, drawing, rank)
            for point in group:
                _score(with_sampler(drawing, point.sample), scorer, folder, rank)
            # Before the weights of the next group are read.
            del drawing
        assert scorer is not None, "a sweep has points"
        ranks.on_main(publish, folder, scorer.rows, scorer.done, scorer.labels)
    scorer.say_best()
    log.info("wrote %s", folder / "sweep.html")
    return folder


def _score(drawing: Drawing, scorer: PointScorer, folder: Path, rank: Rank) -> None:
    """Scores a point unless it is known, and writes all files. Collective."""
    facts = _facts(drawing)
    if scorer.known(facts["digest"]):
        return
    first = FirstImages(_SHOWN)
    blocks = drawn_blocks(drawing, rank)
    scorer.score(blocks, facts, first)
    images = first.on_main()
    ranks.on_main(publish, folder, scorer.rows, scorer.done, scorer.labels, images=images)


def _sections(config: Config) -> tuple[SweepConfig, EvaluateConfig]:
    if config.sweep is None or config.evaluate is None:
        missing = "sweep" if config.sweep is None else "evaluate"
        raise ConfigError("configuration", [Fault(missing, "is required to sweep")])
    return config.sweep, config.evaluate


def _open(config: Config, group: Sequence[Point], rank: Rank) -> Drawing:
    """Returns the drawing of a group's weights, checked with the strongest guidance of its points.

    Collective.
    """
    point = max(group, key=lambda one: one.sample.cfg_scale)
    return open_drawing(replaced(config, sample=point.sample, export=point.export), rank)


def _scorer(
    config: Config, groups: Sequence[Sequence[Point]], folder: Path, drawing: Drawing, rank: Rank
) -> PointScorer:
    settings, measured = _sections(config)
    evaluator = open_evaluator(
        measured,
        image_shape=ranks.together(lambda: drawing.image_shape),
        count=settings.num_samples,
        rank=rank,
        metrics=settings.metrics_for(measured.extractor.label),
    )
    compare_small(evaluator)
    for sentence in evaluator.notes(settings.num_samples):
        log.info("%s", sentence)
    evaluations = [_per_image(point.sample) for group in groups for point in group]
    return PointScorer(
        evaluator, measured, folder=folder, count=settings.num_samples, evaluations=evaluations
    )


def _facts(drawing: Drawing) -> dict[str, Any]:
    """Returns the fields of a point's row that do not depend on its images."""
    sampler = drawing.sampler
    return {
        "weights": drawing.provenance.facts["ema"],
        "solver": sampler.solver,
        "num_steps": sampler.num_steps,
        "cfg_scale": sampler.cfg_scale,
        "interval": (sampler.guidance_low, sampler.guidance_high),
        "evaluations": _per_image(sampler),
        "digest": drawing.provenance.digest(),
    }


def _per_image(sampler: SamplerConfig) -> int:
    """Returns function evaluations per image; a guided call is two."""
    return count_evaluations(sampler).total


@contextmanager
def _claimed(folder: Path, *, is_main: bool) -> Iterator[None]:
    """Keeps other processes from sweeping into `folder` while the block runs."""
    if not is_main:
        yield
        return
    otherwise = ", or choose another sweep.folder"
    with claimed(folder, doing="sweeping into", cure=CURE, otherwise=otherwise):
        yield
