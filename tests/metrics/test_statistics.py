import numpy as np
import pytest
import torch

from srepa_ds.errors import DataError
from srepa_ds.metrics.statistics import FeatureStatistics


def features(count, width, *, seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + offset


def streamed(rows, sizes):
    statistics = FeatureStatistics.empty(rows.shape[1])
    for batch in rows.split(sizes):
        statistics = statistics.updated(batch)
    return statistics


def assert_matches(statistics, rows, *, tolerance=1e-12):
    array = rows.double().numpy()
    assert statistics.count == len(rows)
    np.testing.assert_allclose(statistics.mean, array.mean(axis=0), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(
        statistics.covariance(),
        np.atleast_2d(np.cov(array, rowvar=False)),
        rtol=tolerance,
        atol=tolerance * np.abs(np.cov(array, rowvar=False)).max(),
    )


@pytest.mark.parametrize(("count", "width"), [(2, 1), (101, 7), (50, 64), (1000, 33)])
@pytest.mark.parametrize("batch", [1, 13, 1000])
def test_streams_to_the_covariance_of_numpy(count, width, batch):
    rows = features(count, width)
    assert_matches(streamed(rows, batch), rows)


def test_survives_an_offset_that_raw_sums_do_not():
    rows = features(500, 5, offset=1e7)
    assert_matches(streamed(rows, 37), rows, tolerance=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_accumulates_low_precision_in_float64(dtype):
    rows = features(300, 9).to(dtype)
    statistics = streamed(rows, 32)
    assert statistics.mean.dtype == statistics.scatter.dtype == torch.float64
    assert_matches(statistics, rows)


def test_merges_uneven_and_empty_parts():
    rows = features(103, 6)
    merged = FeatureStatistics.empty(6)
    for part in rows.split([1, 60, 0, 42]):
        merged = merged.merged(streamed(part, 8) if len(part) else FeatureStatistics.empty(6))
    assert_matches(merged, rows)


@pytest.mark.parametrize("origin_offset", [0.0, 1000.0])
def test_summed_tensors_are_the_statistics_of_all_ranks(origin_offset):
    rows = features(90, 4, offset=1000.0)
    origin = torch.full((4,), origin_offset, dtype=torch.float64)
    # The third rank had nothing to do.
    ranks = [streamed(rows[:31], 8), streamed(rows[31:], 8), FeatureStatistics.empty(4)]
    summed = [sum(tensors) for tensors in zip(*(r.tensors(origin) for r in ranks), strict=True)]
    assert_matches(FeatureStatistics.from_tensors(*summed, origin=origin), rows, tolerance=1e-8)


def test_no_ranks_with_features_is_no_statistics():
    origin = torch.zeros(4, dtype=torch.float64)
    tensors = FeatureStatistics.empty(4).tensors(origin)
    assert FeatureStatistics.from_tensors(*tensors, origin=origin).count == 0


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_survives_a_file(tmp_path, suffix):
    rows = features(70, 5)
    path = tmp_path / f"statistics{suffix}"
    streamed(rows, 9).save(path)
    assert_matches(FeatureStatistics.load(path), rows)


def test_npz_has_the_names_of_adm(tmp_path):
    rows = features(70, 5)
    streamed(rows, 9).save(tmp_path / "statistics.npz")
    with np.load(tmp_path / "statistics.npz") as arrays:
        np.testing.assert_allclose(arrays["mu"], rows.mean(dim=0))
        np.testing.assert_allclose(arrays["sigma"], np.cov(rows.numpy(), rowvar=False))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_that_are_no_statistics_are_named(tmp_path, suffix):
    path = tmp_path / f"statistics{suffix}"
    with pytest.raises(DataError, match="no such file"):
        FeatureStatistics.load(path)
    path.write_bytes(b"something else")
    with pytest.raises(DataError, match="holds no feature statistics"):
        FeatureStatistics.load(path)


def test_one_image_has_no_covariance():
    with pytest.raises(DataError, match="at least 2"):
        FeatureStatistics.empty(3).updated(torch.ones(1, 3)).covariance()
