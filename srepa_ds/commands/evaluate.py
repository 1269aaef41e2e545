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
from srepa_ds.files import make_folder, sha256_of, try_writing, write_aside, writing
from srepa_ds.metrics.fdr import fdr_note, printed_ratios, relative_distances
from srepa_ds.metrics.scores import Scores, printed_names
from srepa_ds.sampling.sample_set import SAMPLES, read_provenance
from srepa_ds.schema import to_tree

log = logging.getLogger("srepa_ds")

_CURE = "choose another run.folder or fix its permissions"


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
    # First, because what cannot be written has still been measured.
    _say(result, settings, document)
    ranks.on_main(_write, config.run_folder.results, document)
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
    provenance = ranks.together(_provenance_of, folder)
    evaluator = open_evaluator(
        settings, image_shape=images.image_shape, count=len(images), rank=rank, samples=images
    )
    ranks.on_main(_check_place, config.run_folder.results)
    compare_small(evaluator, images)
    return evaluator.measure_set(images), evaluator, provenance


def _scores_of_drawn(
    config: Config, settings: EvaluateConfig, rank: Rank
) -> tuple[Result, Evaluator, Mapping[str, Any]]:
    drawing = open_drawing(config, rank)
    count = drawing.sampler.num_samples
    shape = ranks.together(lambda: drawing.image_shape)
    evaluator = open_evaluator(settings, image_shape=shape, count=count, rank=rank)
    ranks.on_main(_check_place, config.run_folder.results)
    compare_small(evaluator)
    result = evaluator.measure(drawn_blocks(drawing, rank), count)
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
    fdr = relative_distances(distances, num_images=result.num_images)
    notes = [*result.notes, *([fdr_note(str(settings.reference))] if fdr else [])]
    document = {
        "scores": json.loads(result.scores.to_json()),
        "num_images": result.num_images,
        **({"further_scores": further} if further else {}),
        **fdr,
        **({"notes": notes} if notes else {}),
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


def _provenance_of(images: Path) -> Mapping[str, Any]:
    """Returns the provenance of a sample set; that beside another archive is not its own."""
    if images.is_dir():
        return read_provenance(images)
    return read_provenance(images.parent) if images.name == SAMPLES else {}


def _check_place(path: Path) -> None:
    """Raises OutputError if the results could not be written, before they are measured."""
    with writing(path, cure=_CURE):
        try_writing(path)


def _write(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=2) + "\n"
    with writing(path, cure=_CURE):
        make_folder(path.parent)
        # Two evaluations may end at once: the later one's scores stay, and neither fails.
        write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"), concurrent=True)


def _say(result: Result, settings: EvaluateConfig, document: Mapping[str, Any]) -> None:
    for label, scores in ((settings.extractor.label, result.scores), *result.further.items()):
        names = printed_names(label)
        values = json.loads(scores.to_json())
        log.info("  ".join(f"{names[name]} {value:.4f}" for name, value in values.items()))
    if ratios := [f"{name} {value:.4f}" for name, value in printed_ratios(document).items()]:
        log.info("%s", "  ".join(ratios))
    for sentence in document.get("notes", ()):
        log.warning("%s", sentence)
    log.info("%s", in_words(document["comparable"]))
