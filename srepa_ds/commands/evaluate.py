"""`srepa-ds evaluate`: scores images against real ones, in the feature space of an encoder."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srepa_ds.commands.scoring import compare_small, drawn_blocks
from srepa_ds.config.experiment import Config, samples_folder
from srepa_ds.config.sections import EvaluateConfig
from srepa_ds.distributed import devices, ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.drawing.drawing import open_drawing
from srepa_ds.encoders.published import local_file
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.evaluation.comparable import comparable, in_words
from srepa_ds.evaluation.evaluator import Evaluator, Result
from srepa_ds.evaluation.image_sets import open_images
from srepa_ds.evaluation.opening import open_evaluator
from srepa_ds.evaluation.saving import save_reference
from srepa_ds.files import make_folder, sha256_of, write_aside, writing
from srepa_ds.metrics.fdr import relative_distances
from srepa_ds.metrics.scores import Scores, printed_names
from srepa_ds.sampling.sample_set import read_provenance
from srepa_ds.schema import to_tree

log = logging.getLogger("srepa_ds")


def evaluate(config: Config) -> Scores:
    """Returns the scores and writes them, with their provenance, to `<run.folder>/results.json`.

    Runs on every rank. Raises DataError without images to score, ConfigError without an `evaluate`
    section.
    """
    settings = _section(config)
    devices.use_exact_float32()
    rank = ranks.initialize()
    if settings.draw:
        result, evaluator, provenance = _scores_of_drawn(config, settings, rank)
    else:
        result, evaluator, provenance = _scores_of_set(config, settings, rank)
    document = _document(settings, result, evaluator, provenance)
    ranks.on_main(_write, config.run_folder.results, document)
    _say(result, settings)
    log.info("%s", in_words(document["comparable"]))
    return result.scores


def write_reference(config: Config, path: Path) -> Path:
    """Writes the reference's images and Inception's statistics of it, as ADM publishes them.

    Runs on every rank, returns `path`. Raises DataError for a reference that cannot be read.
    """
    settings = _section(config)
    devices.use_exact_float32()
    return save_reference(settings, path, rank=ranks.initialize())


def _section(config: Config) -> EvaluateConfig:
    if config.evaluate is None:
        raise ConfigError("configuration", [Fault("evaluate", "is required to evaluate")])
    return config.evaluate


def _scores_of_set(
    config: Config, settings: EvaluateConfig, rank: Rank
) -> tuple[Result, Evaluator, Mapping[str, Any]]:
    named = settings.samples or ranks.together(samples_folder, config)
    folder = ranks.together(local_file, named, setting="evaluate.samples")
    images = ranks.together(open_images, folder, setting="evaluate.samples")
    # An archive may lie beside its provenance, or a folder hold it.
    beside = folder if folder.is_dir() else folder.parent
    provenance = ranks.together(read_provenance, beside)
    evaluator = open_evaluator(
        settings, image_shape=images.image_shape, count=len(images), rank=rank, samples=images
    )
    compare_small(evaluator, images)
    return evaluator.measure_set(images), evaluator, provenance


def _scores_of_drawn(
    config: Config, settings: EvaluateConfig, rank: Rank
) -> tuple[Result, Evaluator, Mapping[str, Any]]:
    drawing = open_drawing(config, rank)
    count = drawing.sampler.num_samples
    shape = ranks.together(lambda: drawing.image_shape)
    evaluator = open_evaluator(settings, image_shape=shape, count=count, rank=rank)
    compare_small(evaluator)
    result = evaluator.measure(
        drawn_blocks(drawing, rank), count, block_size=drawing.sampler.batch_size
    )
    return result, evaluator, json.loads(drawing.provenance.text())


def _document(
    settings: EvaluateConfig,
    result: Result,
    evaluator: Evaluator,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the contents of results.json."""
    weights, identity = settings.extractor.weights, evaluator.reference.identity
    further = {name: json.loads(scores.to_json()) for name, scores in result.further.items()}
    distances = {
        label: scores.frechet_distance
        for label, scores in ((settings.extractor.label, result.scores), *result.further.items())
        if scores.frechet_distance is not None
    }
    document = {
        "scores": json.loads(result.scores.to_json()),
        "num_images": result.num_images,
        **({"further_scores": further} if further else {}),
        **relative_distances(distances),
        **({"notes": result.notes} if result.notes else {}),
        "reference_class_accuracy": result.reference_recognised,
        **({"class_precision": result.class_precision} if result.class_precision else {}),
        "settings": to_tree(settings),
        # Scores are comparable only within one feature space and against one reference.
        "extractors": {judge.label: judge.extractor.identity for judge in evaluator.judges},
        "extractor_sha256": sha256_of(weights) if weights else None,
        "reference": identity,
        "reference_id": identity.get("dataset_id"),
        "samples": provenance,
    }
    return {**document, "comparable": comparable(document)}


def _write(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=2) + "\n"
    with writing(path, cure="choose another run.folder or fix its permissions"):
        make_folder(path.parent)
        # Two evaluations may end at once: the later one's scores stay, and neither fails.
        write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"), concurrent=True)


def _say(result: Result, settings: EvaluateConfig) -> None:
    for label, scores in ((settings.extractor.label, result.scores), *result.further.items()):
        names = printed_names(label)
        values = json.loads(scores.to_json())
        log.info("  ".join(f"{names[name]} {value:.4f}" for name, value in values.items()))
    for sentence in result.notes:
        log.warning("%s", sentence)
