"""What samples are compared with: real images, or ADM's archive of images and statistics."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from srepa_ds.documents.npz_reader import NpzArchive
from srepa_ds.encoders.published import local_file
from srepa_ds.errors import DataError
from srepa_ds.evaluation.image_sets import open_images
from srepa_ds.evaluation.images import ImageSet
from srepa_ds.files import reason_of
from srepa_ds.metrics.scores import FeatureKind
from srepa_ds.metrics.statistics import FeatureStatistics
from srepa_ds.weight_file import hash_of_tensors

# Names in ADM's archives: of the pooled features (2,048) and the spatial ones (2,023).
_POOLED, _SPATIAL = ("mu", "sigma"), ("mu_s", "sigma_s")


@dataclass(frozen=True)
class StoredStatistics:
    """Mean and covariance of Inception's features, of a whole data set."""

    pooled: FeatureStatistics | None
    spatial: FeatureStatistics | None

    def of(self, kind: FeatureKind) -> FeatureStatistics | None:
        """Returns the statistics of a kind of features, None for those that are not stored."""
        return {"pooled": self.pooled, "spatial": self.spatial}.get(kind)


@dataclass(frozen=True)
class ReferenceImages:
    """The images to compare with, and the statistics that were stored with them."""

    images: ImageSet | None
    """None for an archive with statistics alone."""
    stored: StoredStatistics
    where: str
    """The place, for messages."""

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this reference from others by its contents, as plain JSON values.

        Raises DataError for images that cannot be read.
        """
        images = self.images
        of_images = {**images.identity, "num_images": len(images)} if images else {}
        return {**of_images, **_hashes(self.stored)}


def open_reference(path: Path, *, setting: str, most: int | None = None) -> ReferenceImages:
    """Returns the reference at `path`; raises DataError, which names the `setting`.

    A name of `WEB_FILES` stands for what was fetched. Of more images than `most`, so many are
    taken, evenly spread.
    """
    path = local_file(path, setting=setting)
    stored, has_images = StoredStatistics(None, None), True
    if path.is_file():
        stored, has_images = _read_stored(path, setting=setting)
    if stored.pooled is not None and not has_images:
        return ReferenceImages(None, stored, str(path))
    images = open_images(path, setting=setting)
    if most is not None and len(images) > most:
        images = images.chosen(evenly_spread(most, len(images)))
    return ReferenceImages(images, stored, str(path))


def _read_stored(path: Path, *, setting: str) -> tuple[StoredStatistics, bool]:
    """Returns the statistics of an archive, and whether it holds images too."""
    try:
        with NpzArchive(path) as archive:
            stored = StoredStatistics(_gaussian(archive, *_POOLED), _gaussian(archive, *_SPATIAL))
            if stored.spatial is not None and stored.pooled is None:
                raise ValueError("it holds mu_s and sigma_s without mu and sigma")
            return stored, "arr_0" in archive.arrays
    except (OSError, ValueError) as error:
        raise DataError(
            f"{setting}: {path}: cannot be read as a reference ({reason_of(error)}); give ADM's "
            ".npz, a folder of images, or shards"
        ) from error


def _gaussian(archive: NpzArchive, mean: str, covariance: str) -> FeatureStatistics | None:
    """Returns stored statistics, None without; raises ValueError for others than Gaussians."""
    present = [name in archive.arrays for name in (mean, covariance)]
    if not any(present):
        return None
    if not all(present):
        raise ValueError(f"it holds one of {mean} and {covariance}, and both belong together")
    mu, sigma = (
        torch.from_numpy(np.asarray(archive.read(name), dtype=np.float64))
        for name in (mean, covariance)
    )
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{mean} of {tuple(mu.shape)} and {covariance} of {tuple(sigma.shape)}")
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise ValueError(f"{mean} or {covariance} holds NaN or infinity")
    return FeatureStatistics.of_gaussian(mu, sigma)


def _hashes(stored: StoredStatistics) -> dict[str, Any]:
    """Returns hashes of the stored statistics, by which they are told apart."""
    return {
        f"{name}_statistics": hash_of_tensors({"mean": found.mean, "scatter": found.scatter})
        for name, found in (("pooled", stored.pooled), ("spatial", stored.spatial))
        if found is not None
    }


def evenly_spread(count: int, total: int) -> Int64[Tensor, " images"]:
    """Returns the indices of at most `count` of `total` images, evenly spread, ascending."""
    count = min(count, total)
    return torch.arange(count) * total // max(count, 1)
