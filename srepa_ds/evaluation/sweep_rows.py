"""The document of a sweep, `sweep.json`: a row for each point that was scored."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from srepa_ds.documents.json_reader import read_json
from srepa_ds.errors import ConfigError, DataError
from srepa_ds.files import reason_of, write_aside
from srepa_ds.metrics.scores import SMALLER_IS_BETTER
from srepa_ds.schema import Section, to_tree, validated

DOCUMENT = "sweep.json"


class SweepRow(Section):
    """One point: its settings, and what was measured there."""

    weights: str
    """The kind of weights that drew it."""

    solver: str
    """Of the sampler, as the four settings that follow."""

    num_steps: int
    """Steps of the solver."""

    cfg_scale: float
    """Scale of the guidance."""

    interval: tuple[float, float]
    """First and last time that is guided."""

    scores: dict[str, float]
    """Fields of `Scores` in the feature space of the first extractor."""

    further_scores: dict[str, dict[str, float]] = {}
    """Those of the further extractors, by label."""

    evaluations: int
    """Function evaluations per image; a guided call counts twice."""

    seconds: float
    """For drawing and scoring."""

    digest: str
    """Of everything that decides the pixels."""

    measured_with: dict[str, Any]
    """What scores must share to be compared: extractors, reference, metrics, number of images."""

    @property
    def picture(self) -> str:
        """The name of the file with its first images."""
        return f"{self.digest[:16]}.png"

    @property
    def described(self) -> str:
        """The settings in one line."""
        guided = f"scale {self.cfg_scale:g}"
        if self.cfg_scale > 1 and self.interval != (0.0, 1.0):
            guided += " in [{:g}, {:g}]".format(*self.interval)
        return f"{self.weights}, {self.solver}, {self.num_steps} steps, {guided}"

    @property
    def num_images(self) -> int:
        """The number of images that were scored."""
        return int(self.measured_with["num_images"])

    def is_of(self, digest: str, measured_with: Mapping[str, Any]) -> bool:
        """Returns whether the same images were scored in the same way."""
        return self.digest == digest and self.measured_with == measured_with


class _Document(Section):
    rows: tuple[SweepRow, ...]


def read_rows(folder: Path) -> tuple[SweepRow, ...]:
    """Returns the rows of a sweep's folder, none if it has no document yet.

    Raises DataError if the document is damaged.
    """
    path = folder / DOCUMENT
    try:
        return validated(_Document, _mapping(read_json(path)), source=str(path)).rows
    except FileNotFoundError:
        return ()
    except ConfigError as error:
        reason = "; ".join(f"{fault.path}: {fault.message}" for fault in error.faults[:3])
        raise _damaged(path, reason) from error
    except (OSError, ValueError) as error:
        raise _damaged(path, reason_of(error)) from error


def write_rows(folder: Path, rows: Iterable[SweepRow]) -> None:
    """Writes the document whole; raises OSError."""
    text = json.dumps({"rows": [to_tree(row) for row in rows]}, indent=2) + "\n"
    write_aside(folder / DOCUMENT, lambda aside: aside.write_text(text, encoding="utf-8"))


def with_row(rows: Sequence[SweepRow], row: SweepRow) -> tuple[SweepRow, ...]:
    """Returns `rows` with `row`, which replaces an earlier one of the same point."""
    others = [one for one in rows if not one.is_of(row.digest, row.measured_with)]
    return (*others, row)


def deciding_score(rows: Iterable[SweepRow]) -> str:
    """Returns the field of `Scores` by which rows are ordered, the first that was measured."""
    measured = {name for row in rows for name in row.scores}
    return next((name for name in SMALLER_IS_BETTER if name in measured), "frechet_distance")


def best_first(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """Returns rows by their `deciding_score`, the best first; those without it last."""
    name = deciding_score(rows)
    sign = 1 if SMALLER_IS_BETTER[name] else -1
    return sorted(rows, key=lambda row: sign * row.scores.get(name, sign * float("inf")))


def _mapping(document: Any) -> Mapping[str, Any]:
    if not isinstance(document, dict):
        raise ValueError("it is no JSON object")
    return document


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path}: cannot be read as the document of a sweep ({reason}); remove it, or choose "
        "another sweep.folder"
    )
