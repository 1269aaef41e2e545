"""`srepa-ds evaluate`: scores of a sample set against real images, in an encoder's features."""

import json
import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from srepa_ds import distributed
from srepa_ds.alignment.teachers import Teacher, load_teacher
from srepa_ds.config import Config, EvaluateConfig
from srepa_ds.data.shards import ShardDataset
from srepa_ds.errors import ConfigError, DataError, Fault, OutputError
from srepa_ds.files import sha256_of, write_aside
from srepa_ds.metrics.scores import Scores, score
from srepa_ds.sampling.writer import PROVENANCE, SAMPLES
from srepa_ds.schema import to_tree

log = logging.getLogger("srepa_ds")

RESULTS = "results.json"


class Features(NamedTuple):
    """What an extractor sees in a set of images."""

    pooled: Tensor
    """(images, width)"""

    recognised: float | None
    """Share of the images whose label it names; None without a classifier."""


def evaluate(config: Config) -> Scores:
    """Returns the scores and writes them, with their provenance, to `<run.folder>/results.json`.

    Raises DataError without a finished sample set, ConfigError without an `evaluate` section.
    """
    if config.evaluate is None:
        raise ConfigError("configuration", [Fault("evaluate", "is required to evaluate")])
    settings = config.evaluate
    device = distributed.local_device()
    folder = settings.samples or config.samples_folder
    images, labels = _read_samples(folder)
    reference = ShardDataset(settings.reference)
    if images.shape[1:3] != reference.image_shape[1:]:
        raise DataError(
            f"{folder} holds images of {images.shape[1:3]} px, but {settings.reference} of "
            f"{reference.image_shape[1:]}; evaluate.reference must be of the same size"
        )
    extractor = load_teacher(settings.extractor, resolution=images.shape[1], device=device)
    drawn = _features(extractor, _sample_batches(images, labels, settings.batch_size), device)
    real = _features(extractor, _reference_batches(reference, settings.batch_size), device)
    scores = score(drawn.pooled, real.pooled, class_accuracy=drawn.recognised)
    _write(config, settings, folder, scores, reference, real.recognised)
    for name, value in json.loads(scores.to_json()).items():
        log.info("%-18s %.4f", name, value)
    return scores


def _read_samples(folder: Path) -> tuple[np.ndarray, np.ndarray | None]:
    path = folder / SAMPLES
    try:
        # Opened here, because numpy leaves a file open that is no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            labels = archive["arr_1"] if "arr_1" in archive.files else None
            return archive["arr_0"], labels
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} is no finished sample set ({error}); draw one with `srepa-ds sample CONFIG`"
        ) from error


def _sample_batches(
    images: np.ndarray, labels: np.ndarray | None, size: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    for start in range(0, len(images), size):
        batch = torch.from_numpy(images[start : start + size]).permute(0, 3, 1, 2).contiguous()
        chosen = None if labels is None else torch.from_numpy(labels[start : start + size])
        yield batch, chosen


def _reference_batches(dataset: ShardDataset, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    for start in range(0, len(dataset), size):
        indices = torch.arange(start, min(start + size, len(dataset)))
        batch = dataset.read(indices)
        yield batch.pixels, batch.labels


def _features(
    extractor: Teacher,
    batches: Iterator[tuple[Tensor, Tensor | None]],
    device: torch.device,
) -> Features:
    pooled, hits, asked = [], 0, 0
    for images, labels in batches:
        seen = extractor.classify(images.to(device))
        pooled.append(seen.pooled.float().cpu())
        if seen.logits is not None and labels is not None:
            hits += int((seen.logits.argmax(1).cpu() == labels).sum())
            asked += len(labels)
    return Features(torch.cat(pooled), hits / asked if asked else None)


def _write(
    config: Config,
    settings: EvaluateConfig,
    samples: Path,
    scores: Scores,
    reference: ShardDataset,
    reference_accuracy: float | None,
) -> None:
    provenance: dict[str, Any] = {}
    if (samples / PROVENANCE).is_file():
        provenance = json.loads((samples / PROVENANCE).read_text(encoding="utf-8"))
    weights = settings.extractor.weights
    document = {
        "scores": json.loads(scores.to_json()),
        "reference_class_accuracy": reference_accuracy,
        "settings": to_tree(settings),
        # Scores compare only within one feature space and against one reference.
        "extractor_sha256": sha256_of(weights) if weights else None,
        "reference_id": reference.index.dataset_id,
        "samples": provenance,
    }
    path = config.run.folder / RESULTS
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=2) + "\n"
        write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
