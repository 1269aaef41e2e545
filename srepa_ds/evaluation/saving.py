"""Writes a reference as ADM publishes it: some images, and statistics of all of them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from srepa_ds.config.sections import EvaluateConfig
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.errors import DataError
from srepa_ds.evaluation.collected import Seen
from srepa_ds.evaluation.images import ImageSet
from srepa_ds.evaluation.opening import open_evaluator
from srepa_ds.evaluation.reference import evenly_spread, open_reference
from srepa_ds.files import make_folder, write_aside, writing
from srepa_ds.sampling.npz import NpzMember, write_npz

_METRICS = ("frechet", "spatial_frechet")


def save_reference(settings: EvaluateConfig, path: Path, *, rank: Rank) -> Path:
    """Writes `arr_0`, `mu`, `sigma`, `mu_s` and `sigma_s`, and returns `path`. Collective.

    `arr_0` holds `evaluate.num_manifold_images` images, evenly spread; the statistics are of all.
    ADM's own script reads the file. Raises DataError for a reference without images, or one that
    holds statistics already, and for another extractor than Inception; OutputError.
    """
    images = ranks.together(_images, settings)
    evaluator = open_evaluator(
        settings, image_shape=images.image_shape, count=len(images), rank=rank, metrics=_METRICS
    )
    (seen, *_) = evaluator.see_reference()
    ranks.on_main(_write, path, images, seen, settings)
    return path


def _images(settings: EvaluateConfig) -> ImageSet:
    if settings.extractor.label != "inception":
        raise DataError(
            f"evaluate.extractor is {settings.extractor.label}, and ADM's statistics are of "
            "inception; set evaluate.extractor.name=inception"
        )
    reference = open_reference(settings.reference, setting="evaluate.reference")
    if reference.images is None or reference.stored.pooled is not None:
        raise DataError(
            f"evaluate.reference: {settings.reference} holds statistics already; give the images"
        )
    return reference.images


def _write(path: Path, images: ImageSet, seen: Seen, settings: EvaluateConfig) -> None:
    chosen = evenly_spread(settings.num_manifold_images, len(images))
    channels, height, width = images.image_shape
    shape = (len(chosen), height, width, channels)
    members = [NpzMember("arr_0", shape, np.dtype(np.uint8), _pixels(images, chosen, settings))]
    for kind, (mean, covariance) in (
        ("pooled", ("mu", "sigma")),
        ("spatial", ("mu_s", "sigma_s")),
    ):
        statistics = seen.features[kind].need_statistics()
        for name, values in ((mean, statistics.mean), (covariance, statistics.covariance())):
            array = values.numpy()
            members.append(NpzMember(name, array.shape, array.dtype, iter([array])))
    with writing(path, cure="choose another place with room for it"):
        make_folder(path.parent)
        write_aside(path, lambda aside: write_npz(aside, members))


def _pixels(
    images: ImageSet, chosen: torch.Tensor, settings: EvaluateConfig
) -> Iterator[np.ndarray]:
    for block in images.chosen(chosen).blocks(settings.batch_size):
        yield block.images.permute(0, 2, 3, 1).contiguous().numpy()
