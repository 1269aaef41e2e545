import numpy as np
import pytest
import scipy.linalg
import torch
from places import GOLDEN
from safetensors.torch import load_file

from srepa_ds.errors import DataError
from srepa_ds.metrics.frechet import frechet_distance, gaussian_frechet_distance
from srepa_ds.metrics.statistics import FeatureStatistics


def statistics(features):
    return FeatureStatistics.empty(features.shape[1]).updated(features)


def random_rows(count, width, seed):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).double()


def reference_distance(a, b):
    """Returns the textbook formula by the eigenvalues of the (unsymmetric) product."""
    a, b = a.numpy(), b.numpy()
    sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    eigenvalues = np.linalg.eigvals(sigma_a @ sigma_b)
    cross = np.sqrt(np.maximum(eigenvalues.real, 0)).sum()
    shift = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    return shift + np.trace(sigma_a) + np.trace(sigma_b) - 2 * cross


def test_agrees_with_the_worked_example():
    k = torch.arange(2400, dtype=torch.float64)
    a = torch.sin(0.37 * k) + 0.1 * torch.cos(k**1.1)
    b = 1.2 * torch.sin(0.29 * k + 1) + 0.2
    found = frechet_distance(statistics(a.reshape(400, 6)), statistics(b.reshape(400, 6)))
    # One covariance has rank 2 of 6: formulas that take roots of zero eigenvalues are off by 1e-7.
    assert found == pytest.approx(0.451394274, abs=1e-7)


@pytest.mark.parametrize("case", ["c0", "c1"])
def test_agrees_with_the_adm_evaluator(case):
    golden = load_file(GOLDEN / "metrics.safetensors")
    found = frechet_distance(
        statistics(golden[f"{case}.sample"]), statistics(golden[f"{case}.ref"])
    )
    assert found == pytest.approx(golden[f"{case}.fid"].item(), rel=1e-4)


@pytest.mark.parametrize(("count", "width"), [(50, 1), (200, 17), (400, 64)])
def test_agrees_with_the_textbook_formula(count, width):
    if width == 1:
        a, b = random_rows(count, 2, 0) * torch.tensor([1, 0]), random_rows(count, 2, 1)
    else:
        mixing = random_rows(width, width, 2)
        a, b = random_rows(count, width, 0) @ mixing, random_rows(count + 3, width, 1) * 0.7 + 0.2
    found = frechet_distance(statistics(a), statistics(b))
    assert found == pytest.approx(reference_distance(a, b), rel=1e-6)
    assert frechet_distance(statistics(b), statistics(a)) == pytest.approx(found, rel=1e-10)


def root_distance(a, b):
    """Returns the textbook formula by scipy's matrix square root."""
    a, b = a.double().numpy(), b.double().numpy()
    sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = scipy.linalg.sqrtm(sigma_a @ sigma_b)
    shift = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    return shift + np.trace(sigma_a) + np.trace(sigma_b) - 2 * np.trace(cross).real


def pair_of_sets(counts, width):
    """Returns sets of clipped features with correlated channels, as a network's are."""
    mixing = random_rows(width, width, 2) / width**0.5
    a = (random_rows(counts[0], width, 0) @ mixing + 0.3).clamp(min=0)
    b = (random_rows(counts[1], width, 1) @ mixing * 1.2 + 0.2).clamp(min=0)
    return a, b


# scipy's root of a product of singular matrices holds noise of the order of the square root of the
# rounding error, per lost dimension.
@pytest.mark.parametrize(
    ("counts", "width", "tolerance"),
    [((400, 300), 40, 1e-8), ((5000, 900), 128, 1e-8), ((30, 25), 64, 1e-5), ((200, 40), 64, 1e-5)],
)
@pytest.mark.filterwarnings("ignore::scipy.linalg.LinAlgWarning")
def test_agrees_with_the_matrix_root_of_scipy(counts, width, tolerance):
    a, b = pair_of_sets(counts, width)
    found = frechet_distance(statistics(a), statistics(b))
    assert found == pytest.approx(root_distance(a, b), rel=tolerance)


@pytest.mark.filterwarnings("ignore::scipy.linalg.LinAlgWarning")
def test_equal_sets_are_at_no_distance_where_the_matrix_root_finds_noise():
    a, _ = pair_of_sets((20, 20), 64)
    found = frechet_distance(statistics(a), statistics(a.clone()))
    assert 0 <= found < 1e-9
    assert found == pytest.approx(root_distance(a, a), abs=1e-3)


@pytest.mark.slow
def test_agrees_with_the_matrix_root_of_scipy_where_features_are_wide():
    a, b = pair_of_sets((1300, 1200), 1024)
    found = frechet_distance(statistics(a.float()), statistics(b.float()))
    assert found == pytest.approx(root_distance(a.float(), b.float()), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [("pool3", "fid"), ("spatial", "sfid")])
def test_agrees_with_the_port_of_adm_where_images_are_fewer_than_channels(kind, name):
    golden = load_file(GOLDEN / "inception.safetensors")
    a, b = (statistics(golden[f"s64.{of}.{kind}"]) for of in ("sample", "ref"))
    assert frechet_distance(a, b) == pytest.approx(golden[f"s64.{name}"].item(), rel=1e-4)


def test_takes_the_mean_and_covariance_of_a_file_of_adm():
    a, b = pair_of_sets((90, 80), 12)
    stored = b.float().mean(dim=0), torch.from_numpy(np.cov(b.numpy(), rowvar=False))
    ours = statistics(a)
    found = gaussian_frechet_distance(ours.mean, ours.covariance(), *stored)
    assert found.item() == pytest.approx(root_distance(a, b), rel=1e-5)


def test_rank_deficient_sets_lose_no_digits():
    # Few images in many dimensions, within the span of a rotated plane: the answer is known from
    # the plane itself.
    width, rank = 96, 5
    basis = torch.linalg.qr(random_rows(width, width, 0)).Q[:, :rank]
    a, b = random_rows(40, rank, 1), random_rows(30, rank, 2) * 1.5 + 0.3
    in_plane = reference_distance(a, b)
    found = frechet_distance(statistics(a @ basis.T), statistics(b @ basis.T))
    assert found == pytest.approx(in_plane, rel=1e-9)


@pytest.mark.parametrize("count", [3, 20, 500])
def test_a_set_is_at_no_distance_from_itself(count):
    rows = statistics(random_rows(count, 40, 0))
    assert 0 <= frechet_distance(rows, rows) < 1e-9


def test_constant_features_differ_by_their_means():
    a, b = torch.zeros(5, 3), torch.full((5, 3), 2.0)
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(12.0)


def test_diagonal_gaussians_have_a_closed_form():
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 4.0, 1.0])
    zero = torch.zeros(3)
    found = gaussian_frechet_distance(zero, a.diag(), zero + 1, b.diag())
    assert found.item() == pytest.approx(3 + 1 + 0 + 4)


def test_broken_features_are_refused():
    broken = random_rows(9, 4, 0)
    broken[3, 2] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        frechet_distance(statistics(broken), statistics(random_rows(9, 4, 1)))
