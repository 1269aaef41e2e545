"""Whether scores can be put beside published ones, as a pure function of results.json."""

from collections.abc import Iterator, Mapping
from typing import Any

from srepa_ds.sampling.presets import PRESETS

PUBLISHED_IMAGES = 50_000
"""The number of images that published scores are of."""

_NO_REASONS = ("num_samples", "seed")
"""Deviations from a preset that are counted otherwise, or do not matter: any seed is as good."""


def comparable(results: Mapping[str, Any]) -> dict[str, Any]:
    """Returns whether scores can be put beside those of the preset they were drawn with.

    `with` is the name of the preset or None, `answer` "yes" or "no", `because` the `reasons`.
    """
    why = reasons(results)
    preset = _part(results, "samples").get("preset") or _sampler(results).get("preset")
    return {
        "with": preset if isinstance(preset, str) else None,
        "answer": "no" if why else "yes",
        "because": why,
    }


def in_words(verdict: Mapping[str, Any]) -> str:
    """Returns what `comparable` returned as a sentence."""
    other = verdict.get("with") or "published scores"
    because = verdict.get("because")
    reasons = "; ".join(map(str, because)) if isinstance(because, list) else ""
    return f"not comparable with {other}: {reasons}" if reasons else f"comparable with {other}"


def reasons(results: Mapping[str, Any]) -> list[str]:
    """Returns why the scores of results.json cannot be put beside published ones, if they cannot.

    Published scores are those of ADM's evaluator: Inception, 50,000 images, ADM's reference with
    its stored statistics, distances in half precision, and the sampler of a paper and its
    decoder, by name. Which weights drew the images is in the provenance, and is not judged here.
    Takes any document: what is missing counts as not known.
    """
    return [
        *_of_features(results),
        *_of_images(results),
        *_of_measuring(results),
        *_of_drawing(results),
    ]


def _of_features(results: Mapping[str, Any]) -> Iterator[str]:
    extractor = _part(_part(results, "settings"), "extractor")
    name = extractor.get("name") or _part(extractor, "spec").get("architecture")
    if name != "inception":
        yield f"the features are those of {name or 'an unknown encoder'}, not of Inception"


def _of_images(results: Mapping[str, Any]) -> Iterator[str]:
    count = results.get("num_images", _sampler(results).get("num_samples"))
    if not isinstance(count, int):
        yield f"the number of images is not known, and published scores are of {PUBLISHED_IMAGES:,}"
    elif count != PUBLISHED_IMAGES:
        yield f"{count:,} images, and published scores are of {PUBLISHED_IMAGES:,}"


def _of_measuring(results: Mapping[str, Any]) -> Iterator[str]:
    if "pooled_statistics" not in _part(results, "reference"):
        yield "the reference has no stored statistics, and ADM's has those of all training images"
    is_measured = _part(results, "scores").keys() & {"precision", "recall"}
    if is_measured and _part(results, "settings").get("distance_arithmetic") == "fp32":
        yield "precision and recall are of distances in fp32, and ADM's are of fp16"


def _of_drawing(results: Mapping[str, Any]) -> Iterator[str]:
    """Yields the reasons that lie in how the images were drawn."""
    samples, sampler = _part(results, "samples"), _sampler(results)
    preset = samples.get("preset") or sampler.get("preset")
    if not samples:
        yield "how the images were drawn is not known; they have no provenance"
    elif not preset:
        yield "the sampler follows no preset"
    deviations = _part(samples, "deviations")
    for name, values in deviations.items():
        if name not in _NO_REASONS:
            yield _deviation(name, values, preset)
    row = PRESETS.get(preset) if isinstance(preset, str) else None
    rounds = row is not None and row.settings["rounding"] == "round"
    if sampler.get("rounding") == "round" and not rounds and "rounding" not in deviations:
        yield "pixels are rounded to the nearest, and REPA and its family truncate them"


def _deviation(name: str, values: Any, preset: Any) -> str:
    here, there = (
        (values.get("here"), values.get("preset"))
        if isinstance(values, Mapping)
        else (values, None)
    )
    if there is None:
        return f"{name} is set, and {preset} has none"
    return f"{name} is {here}, and {preset} has {there}"


def _sampler(results: Mapping[str, Any]) -> Mapping[str, Any]:
    return _part(_part(results, "samples"), "sampler")


def _part(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = document.get(name)
    return found if isinstance(found, Mapping) else {}
