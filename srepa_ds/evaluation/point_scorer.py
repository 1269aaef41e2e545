"""Scores the points of a sweep one after the other, with one reference, and keeps what is known."""

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from srepa_ds.config.sections import EvaluateConfig
from srepa_ds.console import duration
from srepa_ds.distributed import ranks
from srepa_ds.evaluation.evaluator import Evaluator
from srepa_ds.evaluation.first_images import FirstImages
from srepa_ds.evaluation.images import ImageBlock
from srepa_ds.evaluation.sweep_rows import (
    SweepRow,
    best_first,
    deciding_score,
    read_rows,
    with_row,
)
from srepa_ds.metrics.scores import Scores, printed_names

log = logging.getLogger("srepa_ds")


class PointScorer:
    """Scores points, or finds that they were scored before. All methods are collective."""

    def __init__(
        self,
        evaluator: Evaluator,
        settings: EvaluateConfig,
        *,
        folder: Path,
        count: int,
        evaluations: Sequence[int],
    ):
        """Reads the rows in `folder`; raises DataError on all ranks if they are damaged.

        `count` images are scored for each point; `evaluations` are the function evaluations per
        image of each point in turn, by which the time left is estimated.
        """
        self.rows: Sequence[SweepRow] = ranks.on_main(read_rows, folder)
        """All rows of the folder, with those of other sweeps."""
        self.done: list[SweepRow] = []
        """The rows of this sweep's points, as far as it has come."""
        self.labels = [judge.label for judge in evaluator.judges]
        self._evaluator = evaluator
        self._count = count
        self._left = list(evaluations)
        self._total = len(self._left)
        self._with = ranks.on_main(_measured_with, evaluator, settings, count)
        self._spent: list[tuple[float, int]] = []

    def known(self, digest: str) -> bool:
        """Returns whether the point of that digest was scored before, and counts it as done."""
        row = next((row for row in self.rows if row.is_of(digest, self._with)), None)
        if row is not None:
            self._finish(row, "was scored before")
        return row is not None

    def score(
        self,
        blocks: Iterable[ImageBlock],
        facts: Mapping[str, Any],
        first: FirstImages,
    ) -> None:
        """Scores a point; `facts` are the fields of its row, and `first` keeps some of its images.

        Raises DataError on all ranks as `Evaluator.measure` does.
        """
        began = time.perf_counter()
        result = self._evaluator.measure(first.passing(blocks), self._count)
        seconds = time.perf_counter() - began
        self._spent.append((seconds, facts["evaluations"]))
        row = SweepRow(
            **facts,
            scores=_numbers(result.scores),
            further_scores={label: _numbers(scores) for label, scores in result.further.items()},
            seconds=seconds,
            measured_with=self._with,
        )
        self.rows = with_row(self.rows, row)
        self._finish(row, duration(seconds))

    def say_best(self) -> None:
        """Logs the best point of this sweep."""
        best, name = best_first(self.done)[0], deciding_score(self.done)
        score = printed_names(self.labels[0])[name]
        log.info(
            "best of %d points by %s: %s: %s",
            *(self._total, score, best.described, self._scores(best)),
        )

    def _finish(self, row: SweepRow, how: str) -> None:
        self.done.append(row)
        self._left.pop(0)
        log.info(
            "point %d of %d: %s: %s (%s%s)",
            *(len(self.done), self._total, row.described, self._scores(row), how, self._rest()),
        )

    def _rest(self) -> str:
        """Returns the time left, by the function evaluations of the points that are left."""
        if not self._spent or not self._left:
            return ""
        seconds = sum(seconds for seconds, _ in self._spent)
        evaluations = sum(evaluations for _, evaluations in self._spent)
        return f"; {duration(seconds / evaluations * sum(self._left))} left"

    def _scores(self, row: SweepRow) -> str:
        names = printed_names(self.labels[0])
        return ", ".join(f"{names[name]} {value:.4g}" for name, value in row.scores.items())


def _numbers(scores: Scores) -> dict[str, float]:
    return {name: value for name, value in asdict(scores).items() if value is not None}


def _measured_with(evaluator: Evaluator, settings: EvaluateConfig, count: int) -> dict[str, Any]:
    """Returns what the scores of two points must share to be compared, as JSON values."""
    facts = {
        "num_images": count,
        "reference": evaluator.reference.identity,
        "extractors": {judge.label: judge.extractor.identity for judge in evaluator.judges},
        "metrics": {judge.label: judge.metrics for judge in evaluator.judges},
        "num_manifold_images": settings.num_manifold_images,
        "distance_arithmetic": settings.distance_arithmetic,
    }
    return json.loads(json.dumps(facts))
