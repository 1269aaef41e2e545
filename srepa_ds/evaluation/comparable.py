"""Whether scores can be put beside published ones, as a pure function of results.json."""

from collections.abc import Iterator, Mapping
from typing import Any

from srepa_ds.encoders.publications import WEB_FILES
from srepa_ds.sampling.presets import PRESETS

PUBLISHED_IMAGES = 50_000
"""The number of images that published scores are of."""

MANIFOLD_IMAGES = 10_000
"""The number of real images that published precision and recall are of."""

_ADM_FILES = tuple(WEB_FILES[name].name for name in ("adm-imagenet256", "adm-imagenet512"))
"""Names of ADM's references, whose hashes nobody publishes."""

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

    Published scores are those of ADM's evaluator: Inception with its published weights, 50,000
    images, ADM's reference with its stored statistics and images, distances in half precision, the
    sampler of a paper and its decoder. Reference and decoder are known by their names. Which
    weights drew the images is in the provenance, and is not judged here. Takes any document: what
    is missing counts as not known.
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
        return
    weights = _part(_part(results, "extractors"), "inception").get("weights_sha256")
    if not weights:
        yield "which weights Inception has is not known"
    elif weights != WEB_FILES["inception"].sha256:
        yield f"Inception has other weights than the published ones (sha256 {weights})"


def _of_images(results: Mapping[str, Any]) -> Iterator[str]:
    count = results.get("num_images", _sampler(results).get("num_samples"))
    if not isinstance(count, int):
        yield f"the number of images is not known, and published scores are of {PUBLISHED_IMAGES:,}"
    elif count != PUBLISHED_IMAGES:
        yield f"{count:,} images, and published scores are of {PUBLISHED_IMAGES:,}"


def _of_measuring(results: Mapping[str, Any]) -> Iterator[str]:
    reference, scores = _part(results, "reference"), _part(results, "scores")
    file, settings = reference.get("file"), _part(results, "settings")
    if "pooled_statistics" not in reference:
        yield "the reference has no stored statistics, and ADM's has those of all training images"
    elif file not in _ADM_FILES:
        called = f"it is called {file}" if file else "it holds no images"
        yield f"the reference is not known to be ADM's ({called}, not {' or '.join(_ADM_FILES)})"
    elif "spatial_frechet_distance" in scores and "spatial_statistics" not in reference:
        yield "the reference has no stored statistics for sFID, and ADM's has"
    if not scores.keys() & {"precision", "recall"}:
        return
    if settings.get("distance_arithmetic") == "fp32":
        yield "precision and recall are of distances in fp32, and ADM's are of fp16"
    yield from _of_real_images(reference, settings.get("num_manifold_images"))


def _of_real_images(reference: Mapping[str, Any], most: Any) -> Iterator[str]:
    """Yields a reason unless precision and recall are of as many real images as published ones."""
    available = reference.get("num_images")
    if not isinstance(available, int) or not isinstance(most, int):
        yield "the number of real images for precision and recall is not known"
        return
    # ADM's reference of 512 px is said to hold fewer, which published scores are of then.
    is_adms = reference.get("file") in _ADM_FILES
    published = min(available, MANIFOLD_IMAGES) if is_adms else MANIFOLD_IMAGES
    if (used := min(available, most)) != published:
        yield (
            f"precision and recall are of {used:,} real images, and published ones of {published:,}"
        )


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
