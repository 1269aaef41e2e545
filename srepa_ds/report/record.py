"""Reads the documents in a run's folder, and names the training objective."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from srepa_ds.alignment.alignment import AlignmentConfig
from srepa_ds.config.experiment import Config
from srepa_ds.documents.json_reader import read_json
from srepa_ds.errors import DataError
from srepa_ds.schema import validated
from srepa_ds.telemetry.json_lines import read_lines
from srepa_ds.telemetry.metrics_log import is_metrics
from srepa_ds.trees import load_tree

Line = Mapping[str, float]

# Those of float32 end at 3.4e38. Matplotlib fails near the largest of float64.
_LARGEST = 1e100


def read_metrics(path: Path) -> tuple[Line, ...]:
    """Returns the lines of a run's metrics in order, without torn and damaged ones.

    Logs a warning for damaged ones. Raises DataError if there are no others.
    """
    hint = "train first: `srepa-ds train CONFIG`"
    try:
        lines = read_lines(path, is_metrics)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: {reason}, so there is no run to report on; {hint}") from error
    if not lines.good:
        raise DataError(f"{path}: holds no metrics; {hint}")
    lines.warn("the report leaves them out")
    return tuple(_numbers(line.value) for line in lines.good)


def _numbers(values: Mapping[str, Any]) -> Line:
    """Returns the values that are numbers, as the float they are drawn with."""
    return {name: float(value) for name, value in values.items() if is_drawable(value)}


def is_drawable(value: Any) -> bool:
    """Returns whether a value of a document is a number that a picture or a sum can hold."""
    return isinstance(value, int | float) and abs(value) <= _LARGEST


def read_document(path: Path, *, hint: str = "") -> dict[str, Any]:
    """Returns the JSON object in a file; raises DataError, with `hint`, if it holds none."""
    try:
        document = read_json(path)
    except OSError as error:
        raise DataError(f"{path.name}: {error.strerror}; {hint}") from error
    except ValueError as error:
        raise DataError(f"{path.name}: is not JSON ({error}); {hint}") from error
    if not isinstance(document, dict):
        raise DataError(f"{path.name}: is not a JSON object; {hint}")
    return document


def part(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the object `name` of a document, empty if there is none."""
    found = document.get(name)
    return found if isinstance(found, dict) else {}


def trained_config(config: Config) -> Config:
    """Returns the configuration the run was trained with, or `config` if there is none."""
    path = config.run_folder.config
    # Without cross-checks: the files it names may have gone since, or be on another machine.
    return validated(Config, load_tree(path), source=str(path)) if path.is_file() else config


def training_seconds(lines: Sequence[Line]) -> float:
    """Returns the time the recorded steps took."""
    before, total = 0.0, 0.0
    for line in lines:
        # Distances measured during training have lines of their own, without a step time.
        if "step_seconds" in line:
            total += line["step_seconds"] * (line["step"] - before)
            before = line["step"]
    return total


def mode_of(config: Config) -> str:
    """Returns the name of the training objective, as the papers call it."""
    names = dict.fromkeys(_mode(alignment) for alignment in config.alignments)
    if config.model.class_token_width is not None:
        names = {"REG": None, **{name: None for name in names if name != "REPA"}}
    return " + ".join(names) or "SiT"


def _mode(alignment: AlignmentConfig) -> str:
    is_irepa = alignment.projector.kind == "conv" or alignment.spatial_norm is not None
    base = "iREPA" if is_irepa else "REPA"
    if alignment.structural is None:
        return base
    kind = alignment.structural.kind.upper()
    if not alignment.pointwise:
        return f"structural {kind} alone"
    return f"iREPA + sREPA-{kind}" if is_irepa else f"sREPA-{kind}"


def objective_of(config: Config) -> str:
    """Returns the sum that is minimised, in words."""
    flow = "flow matching"
    if config.model.class_token_width is not None:
        flow += f" + {config.objective.cls_weight:g} · that of the class token"
    terms = [_terms(alignment) for alignment in config.alignments]
    if not terms:
        return f"{flow} alone"
    if len(terms) == 1:
        return f"{flow} + {terms[0]}"
    return f"{flow} + the mean of ({'; '.join(terms)})"


def _terms(alignment: AlignmentConfig) -> str:
    terms = []
    if alignment.pointwise:
        terms.append(f"{alignment.pointwise.weight:g} · point-wise")
    if alignment.structural:
        kind = alignment.structural.kind.upper()
        terms.append(f"{alignment.structural.weight:g} · structural {kind}")
    return " + ".join(terms) + f" at block {alignment.depth}"
