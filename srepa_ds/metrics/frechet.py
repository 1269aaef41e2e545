"""The Frechet distance between Gaussians, without a matrix square root."""

import torch
from jaxtyping import Float
from torch import Tensor

from srepa_ds.errors import DataError
from srepa_ds.metrics.statistics import FeatureStatistics


def frechet_distance(samples: FeatureStatistics, reference: FeatureStatistics) -> float:
    """Returns the Frechet distance between Gaussians fitted to two sets of features.

    Symmetric, 0 for equal sets; with Inception's features it is the FID. Source: Heusel et al.
    (2017). Raises DataError below two features in a set or for features that are not finite.
    """
    distance = gaussian_frechet_distance(
        samples.mean, samples.covariance(), reference.mean, reference.covariance()
    )
    return distance.item()


def gaussian_frechet_distance(
    mean_a: Float[Tensor, " width"],
    covariance_a: Float[Tensor, "width width"],
    mean_b: Float[Tensor, " width"],
    covariance_b: Float[Tensor, "width width"],
) -> Float[Tensor, ""]:
    """Returns |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2) in float64.

    The inputs may have any float dtype. With A = F F' and B = G G' the last trace is the sum of the
    singular values of F'G. That stays exact for rank-deficient covariances, where roots of tiny
    eigenvalues would only be noise. Source: Dowson and Landau (1982). Raises DataError for means or
    covariances that are not finite.
    """
    tensors = (mean_a.double(), covariance_a.double(), mean_b.double(), covariance_b.double())
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise DataError("features hold NaN or infinity; check the images and the network")
    mean_a, covariance_a, mean_b, covariance_b = tensors
    cross = torch.linalg.svdvals(_factor(covariance_a).T @ _factor(covariance_b)).sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace()
    return (distance - 2 * cross).clamp(min=0)


def _factor(covariance: Tensor) -> Tensor:
    """Returns float64 F (width, rank) with F F' = covariance; drops rounding-level eigenvalues."""
    eigenvalues, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    noise_level = eigenvalues.max() * len(eigenvalues) * torch.finfo(torch.float64).eps
    kept = eigenvalues > noise_level.clamp(min=0)
    return vectors[:, kept] * eigenvalues[kept].sqrt()
