"""The scores of a run: their table, how they were measured, and which classes do worst."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from srepa_ds.evaluation.comparable import comparable
from srepa_ds.metrics.fdr import printed_ratios
from srepa_ds.metrics.scores import printed_names
from srepa_ds.report.markup import Markup, element, joined, note, section, table
from srepa_ds.report.record import is_drawable, part
from srepa_ds.report.tables import number

_MEANINGS = {
    "frechet_distance": "smaller is better",
    "spatial_frechet_distance": "over features of every position; smaller is better",
    "inception_score": "larger is better",
    "precision": "share of the samples inside the reference's manifold",
    "recall": "share of the reference inside the samples' manifold",
    "kernel_distance": "squared maximum mean discrepancy; smaller is better",
    "class_accuracy": "share of the samples recognised as the class asked for",
}
_RATIO = "distance as a multiple of the validation images'; smaller is better"
_DIGEST = 12
"""Digits shown of a hash, enough to tell files apart."""
_SHOWN_CLASSES = 5
_EVALUATIONS = "function evaluations per image"


def score_table(results: Mapping[str, Any]) -> Markup:
    """Returns the scores, one row each, those of further extractors too, and the notes on them."""
    real = results.get("reference_class_accuracy")
    rows = []
    further = part(results, "further_scores")
    for label in (None, *further):
        own = part(results, "scores") if label is None else part(further, label)
        names = printed_names(label or _label(results))
        for name, value in own.items():
            meaning = _MEANINGS.get(name, "")
            if name == "class_accuracy" and real is not None:
                meaning += f"; for the real images it is {number(real)}"
            rows.append((names.get(name, name.replace("_", " ")), number(value), meaning))
    ratios = {"fdr": part(results, "fdr"), "fdr6": results.get("fdr6")}
    rows += [(name, number(value), _RATIO) for name, value in printed_ratios(ratios).items()]
    said = results.get("notes")
    notes = [note(text) for text in said if isinstance(text, str)] if isinstance(said, list) else []
    return element("div", table(rows), *notes, class_="scores")


def scores_section(results: Mapping[str, Any], *, class_names: Sequence[str] = ()) -> Markup:
    """Returns how and on what the scores were measured, and the precision of single classes."""
    settings, samples = part(results, "settings"), part(results, "samples")
    extractor = part(settings, "extractor")
    rows = [
        ("comparable", _verdict(results)),
        ("real images", str(settings.get("reference")) + _short(results.get("reference_id"))),
        ("feature space", _label(results)),
        (
            "its weights",
            str(extractor.get("weights") or "published ones")
            + _short(results.get("extractor_sha256")),
        ),
        *((name.replace("_", " "), number(v)) for name, v in _drawn_with(results, samples)),
    ]
    body = joined(table(rows), _classes(part(results, "class_precision"), class_names))
    return section("scores", "What was scored", body)


def _label(results: Mapping[str, Any]) -> str:
    """Returns the name of the extractor; earlier releases noted only its settings."""
    if labels := list(part(results, "extractors")):
        return str(labels[0])
    extractor = part(part(results, "settings"), "extractor")
    return str(extractor.get("name") or part(extractor, "spec").get("architecture"))


def _verdict(results: Mapping[str, Any]) -> str:
    """Returns the answer to whether the scores can be put beside published ones, with reasons."""
    found = comparable(results)
    if found["because"]:
        return f"no, because {'; '.join(found['because'])}"
    return f"yes, with {found['with']}"


def _short(digest: Any) -> str:
    return f" ({digest[:_DIGEST]}…)" if isinstance(digest, str) else ""


def _drawn_with(results: Mapping[str, Any], samples: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns the facts of the provenance that people ask for, and all settings of the sampler."""
    found: list[tuple[str, Any]] = []
    if "num_images" in results:
        found.append(("images", results["num_images"]))
    if "ema" in samples:
        found.append(("weights", samples["ema"]))
    if "preset" in samples:
        deviations = part(samples, "deviations")
        found += [("preset", samples["preset"]), ("deviations", _deviations(deviations))]
    if evaluations := part(samples, "evaluations"):
        parts = [f"{number(value)} {name}" for name, value in evaluations.items() if value]
        found.append((_EVALUATIONS, " + ".join(parts)))
    sampler = part(samples, "sampler")
    if sampler and "rounding" not in sampler:
        # Of the default, older sets note nothing.
        found.append(("rounding", "truncate"))
    return [*found, *sampler.items()]


def _deviations(deviations: Mapping[str, Any]) -> str:
    texts = []
    for name, values in deviations.items():
        both = values if isinstance(values, dict) else {"here": values}
        texts.append(f"{name} {number(both.get('here'))} (preset {number(both.get('preset'))})")
    return "; ".join(texts) or "none"


def _classes(precision: Mapping[str, Any], names: Sequence[str]) -> Markup:
    """Returns the classes with the lowest and the highest precision."""
    found = [(key, float(value)) for key, value in precision.items() if is_drawable(value)]
    if not found:
        return Markup()
    ordered = sorted(found, key=lambda pair: pair[1])
    middle = statistics.median(value for _, value in found)
    text = (
        "Share of each class's images inside the reference's manifold; the median of "
        f"{len(found):,} classes is {number(middle)}."
    )
    lowest = ordered[:_SHOWN_CLASSES]
    highest = ordered[len(lowest) :][-_SHOWN_CLASSES:]
    rows = [(_class(key, names), _bar(value)) for key, value in (*lowest, *highest)]
    return joined(
        element("h3", "Precision by class"),
        element("p", text, class_="soft"),
        table(rows, header=("class", "precision, lowest and highest")),
    )


def _class(key: str, names: Sequence[str]) -> str:
    is_known = key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < len(names)
    return f"{key}, {names[int(key)]}" if is_known and names[int(key)] != key else key


def _bar(share: float) -> Markup:
    percent = f"width:{100 * min(max(share, 0.0), 1.0):.1f}%"
    return element("span", element("i", style=percent), number(share), class_="bar")
