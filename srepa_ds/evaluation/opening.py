"""Opens an evaluator: checks all that can be checked before an image is looked at."""

from collections.abc import Mapping, Sequence
from typing import Any

from srepa_ds.config.sections import EvaluateConfig
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.encoders.extractors import load_extractor
from srepa_ds.encoders.publications import WEB_FILES
from srepa_ds.errors import DataError
from srepa_ds.evaluation.choosing import Choosing
from srepa_ds.evaluation.evaluator import Evaluator, Judge
from srepa_ds.evaluation.images import ImageSet
from srepa_ds.evaluation.reference import ReferenceImages, open_reference


def open_evaluator(
    settings: EvaluateConfig,
    *,
    image_shape: tuple[int, int, int],
    count: int,
    rank: Rank,
    metrics: Sequence[str] | None = None,
    most_reference: int | None = None,
    samples: ImageSet | None = None,
) -> Evaluator:
    """Returns an evaluator for `count` images of `image_shape`. Collective.

    `metrics` replace those of the settings; of the reference, at most `most_reference` images are
    taken. All that can be checked is checked before an image is looked at, also that all ranks have
    the same reference, extractors and, where they are given, `samples`. Raises DataError on all
    ranks for a reference or extractor that cannot be used, or too few images, and ConfigError for
    ranks that differ.
    """
    evaluator = ranks.together(_open, settings, image_shape, count, rank, metrics, most_reference)
    facts = ranks.together(_facts, evaluator, count, samples)
    ranks.check_same(
        facts, what="ranks evaluate with different files; give all of them the same files"
    )
    return evaluator


def _open(
    settings: EvaluateConfig,
    image_shape: tuple[int, int, int],
    count: int,
    rank: Rank,
    metrics: Sequence[str] | None,
    most_reference: int | None,
) -> Evaluator:
    reference = open_reference(
        settings.reference, setting="evaluate.reference", most=most_reference
    )
    if reference.images is not None and reference.images.image_shape != image_shape:
        raise DataError(
            f"evaluate.reference: {reference.images.where} holds images of "
            f"{_size(reference.images.image_shape)} px, and those to score have "
            f"{_size(image_shape)}; give a reference of the same size"
        )
    asked = settings.metrics if metrics is None else tuple(metrics)
    choosing = Choosing(settings, reference, count, asked)
    configs = (settings.extractor, *settings.further_extractors)
    # Before weights are read.
    chosen = [choosing.metrics_of(config, is_first=not n) for n, config in enumerate(configs)]
    judges = [
        Judge(
            config.label,
            load_extractor(config, resolution=image_shape[1:], device=rank.device),
            own,
        )
        for config, own in zip(configs, chosen, strict=True)
    ]
    remarks = list(choosing.remarks)
    for judge in judges:
        if judge.label == "inception":
            _check_widths(judge, reference)
            remarks += _on_weights(judge)
    return Evaluator(settings, judges, reference, rank=rank, remarks=remarks)


def _check_widths(judge: Judge, reference: ReferenceImages) -> None:
    """Raises DataError for stored statistics of other features than Inception's."""
    stored, extractor = reference.stored, judge.extractor
    for name, found, width in (
        ("mu", stored.pooled, extractor.width),
        ("mu_s", stored.spatial, extractor.spatial_width),
    ):
        if found is not None and len(found.mean) != width:
            raise DataError(
                f"evaluate.reference: {reference.where}: {name} has {len(found.mean):,} values, "
                f"and {width:,} are needed, one for each feature of Inception; give statistics of "
                "Inception's features, as ADM publishes them, or the images"
            )


def _on_weights(judge: Judge) -> list[str]:
    """Returns a sentence if Inception's weights are not the published ones."""
    found = judge.extractor.identity.get("weights_sha256")
    if found == WEB_FILES["inception"].sha256:
        return []
    return [
        f"Inception has other weights than the published ones (sha256 {found}): its scores compare "
        "with those of the same weights alone, and stored statistics have to be of them too"
    ]


def _facts(evaluator: Evaluator, count: int, samples: ImageSet | None) -> dict[str, Any]:
    """Returns what all ranks must share, by names that a message can show."""
    parts: dict[str, Mapping[str, Any]] = {"evaluate.reference": evaluator.reference.identity}
    if samples is not None:
        parts["evaluate.samples"] = samples.identity
    for judge in evaluator.judges:
        parts[f"extractor {judge.label}"] = judge.extractor.identity
    named = {f"{part}: {key}": fact for part, facts in parts.items() for key, fact in facts.items()}
    return {**named, "number of images to score": count}


def _size(shape: tuple[int, int, int]) -> str:
    return f"{shape[1]} x {shape[2]}"
