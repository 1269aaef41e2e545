"""Opens an evaluator: checks all that can be checked before an image is looked at."""

from collections.abc import Sequence

from srepa_ds.config.sections import EvaluateConfig
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.encoders.extractors import ExtractorConfig, load_extractor
from srepa_ds.errors import DataError
from srepa_ds.evaluation.evaluator import Evaluator, Judge
from srepa_ds.evaluation.reference import ReferenceImages, open_reference
from srepa_ds.metrics.scores import METRICS, check_counts

_OF_FURTHER = ("frechet", "kernel_distance")
# Without enough images for it, the others are still those of ADM's evaluator.
_LEFT_OUT = ("kernel_distance",)


def open_evaluator(
    settings: EvaluateConfig,
    *,
    image_shape: tuple[int, int, int],
    count: int,
    rank: Rank,
    metrics: Sequence[str] | None = None,
    most_reference: int | None = None,
) -> Evaluator:
    """Returns an evaluator for `count` images of `image_shape`. Collective.

    `metrics` replace those of the settings; of a reference of shards, at most `most_reference`
    images are taken. All that can be checked is checked before an image is looked at. Raises
    DataError on all ranks for a reference or extractor that cannot be used, or too few images.
    """
    return ranks.together(_open, settings, image_shape, count, rank, metrics, most_reference)


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
    configs = (settings.extractor, *settings.further_extractors)
    chosen, left_out = [], []
    for number, config in enumerate(configs):
        own, others = _metrics_of(config, asked, settings, reference, count, number == 0)
        chosen.append(own)
        left_out += others
    resolution = image_shape[1:]
    judges = [
        Judge(config.label, load_extractor(config, resolution=resolution, device=rank.device), own)
        for config, own in zip(configs, chosen, strict=True)
    ]
    return Evaluator(settings, judges, reference, rank=rank, left_out=left_out)


def _metrics_of(
    config: ExtractorConfig,
    asked: tuple[str, ...] | None,
    settings: EvaluateConfig,
    reference: ReferenceImages,
    count: int,
    is_first: bool,
) -> tuple[tuple[str, ...], list[str]]:
    """Returns the metrics to compute with an extractor, and why others are left out.

    Raises DataError for metrics that were asked for and cannot be had.
    """
    is_inception = config.label == "inception"
    possible = [name for name in METRICS if _suits(name, is_inception, is_first)]
    stored = reference.stored if is_inception else None
    chosen, notes = [], []
    for name in possible if asked is None else [name for name in asked if name in possible]:
        try:
            _check_enough(name, settings, reference, count, stored is not None)
        except DataError as error:
            if asked is not None or name not in _LEFT_OUT:
                raise
            notes.append(f"{name} is left out: {error}")
        else:
            chosen.append(name)
    if is_first and asked is not None and (missing := [n for n in asked if n not in possible]):
        raise DataError(
            f"evaluate.metrics: {', '.join(missing)}: the extractor '{config.label}' has no such "
            "features; use the extractor inception, or leave them out"
        )
    return tuple(chosen), notes


def _suits(name: str, is_inception: bool, is_first: bool) -> bool:
    if not is_first:
        return name in _OF_FURTHER
    return is_inception or name not in ("spatial_frechet", "inception_score")


def _check_enough(
    name: str, settings: EvaluateConfig, reference: ReferenceImages, count: int, is_stored: bool
) -> None:
    """Raises DataError unless both sets have the images that a metric needs."""
    row = METRICS[name]
    if row.takes_reference and not row.takes_rows and is_stored:
        available = reference.stored.spatial if name == "spatial_frechet" else True
        if available is not None and reference.stored.pooled is not None:
            check_counts([name], samples=count, reference=count)
            return
    images = reference.images
    real = 0 if images is None else len(images)
    if row.takes_rows:
        real = min(real, settings.num_manifold_images)
    check_counts([name], samples=count, reference=real)


def _size(shape: tuple[int, int, int]) -> str:
    return f"{shape[1]} x {shape[2]}"
