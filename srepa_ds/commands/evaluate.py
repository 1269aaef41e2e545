"""`srepa-ds evaluate`: scores a sample set against real images by an encoder's features."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from srepa_ds.config.experiment import Config, samples_folder
from srepa_ds.data.shards import Parts, ShardDataset
from srepa_ds.distributed import devices
from srepa_ds.encoders.extractors import load_extractor
from srepa_ds.encoders.features import Extractor
from srepa_ds.errors import ConfigError, DataError, Fault
from srepa_ds.files import make_folder, sha256_of, write_aside, writing
from srepa_ds.metrics.manifold import check_count
from srepa_ds.metrics.scores import Scores, notes_on, score
from srepa_ds.sampling.sample_set import read_provenance, read_samples
from srepa_ds.schema import to_tree

log = logging.getLogger("srepa_ds")


class Seen(NamedTuple):
    """The features of a set of images, and the share that the extractor recognises."""

    pooled: Tensor
    """(images, width), float32, on the CPU."""

    recognised: float | None
    """Share of the images whose label it predicts; None without labels or without a classifier."""


def evaluate(config: Config) -> Scores:
    """Returns the scores and writes them, with their provenance, to `<run.folder>/results.json`.

    Raises DataError without a finished sample set, ConfigError without an `evaluate` section.
    """
    if config.evaluate is None:
        raise ConfigError("configuration", [Fault("evaluate", "is required to evaluate")])
    settings = config.evaluate
    devices.use_exact_float32()
    device = devices.take_device()
    folder = settings.samples or samples_folder(config)
    images, labels = read_samples(folder)
    provenance = read_provenance(folder)
    reference = ShardDataset(settings.reference, parts=Parts(moments=False))
    reference.require_images("the extractor looks at images")
    reference.compare_if_small()
    if images.shape[1:3] != reference.image_shape[1:]:
        raise DataError(
            f"{folder} holds images of {images.shape[1:3]} px, but {settings.reference} of "
            f"{reference.image_shape[1:]}; set evaluate.reference to images of the same size"
        )
    for name, count in (("sample", len(images)), ("reference", len(reference))):
        # Known before anything is computed.
        check_count(name, count)
    extractor = load_extractor(settings.extractor, resolution=images.shape[1:3], device=device)
    drawn = _features(extractor, _sample_batches(images, labels, settings.batch_size), device)
    real = _features(extractor, _reference_batches(reference, settings.batch_size), device)
    scores = score(drawn.pooled, real.pooled, class_accuracy=drawn.recognised)
    measured = json.loads(scores.to_json())
    notes = notes_on(samples=len(images), reference=len(reference), width=drawn.pooled.shape[1])
    weights = settings.extractor.weights
    document = {
        "scores": measured,
        **({"notes": notes} if notes else {}),
        "reference_class_accuracy": real.recognised,
        "settings": to_tree(settings),
        # Scores are comparable only within one feature space and against one reference.
        "extractor_sha256": sha256_of(weights) if weights else None,
        "reference_id": reference.index.dataset_id,
        "samples": provenance,
    }
    _write(config.run_folder.results, document)
    for name, value in measured.items():
        log.info("%-18s %.4f", name, value)
    for sentence in notes:
        log.warning("%s", sentence)
    return scores


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
    extractor: Extractor,
    batches: Iterator[tuple[Tensor, Tensor | None]],
    device: torch.device,
) -> Seen:
    pooled, hits, asked = [], 0, 0
    for images, labels in batches:
        seen = extractor.features(images.to(device))
        pooled.append(seen.pooled.float().cpu())
        if seen.logits is not None and labels is not None:
            hits += int((seen.logits.argmax(1).cpu() == labels).sum())
            asked += len(labels)
    return Seen(torch.cat(pooled), hits / asked if asked else None)


def _write(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=2) + "\n"
    with writing(path, cure="choose another run.folder or fix its permissions"):
        make_folder(path.parent)
        # Two evaluations may end at once: the later one's scores stay, and neither fails.
        write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"), concurrent=True)
