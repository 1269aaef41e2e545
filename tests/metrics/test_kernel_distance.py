import pytest
import torch

from srepa_ds.errors import DataError
from srepa_ds.metrics.kernel_distance import kernel_distance


def features(count, width, *, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator).abs() + shift


@pytest.mark.parametrize(
    ("counts", "width", "subsets", "size"),
    [((1300, 1100), 64, 20, 1000), ((97, 60), 7, 50, 30), ((40, 40), 2048, 10, 40)],
)
def test_agrees_with_torch_fidelity(counts, width, subsets, size):
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    samples = features(counts[0], width, seed=0, shift=0.1)
    reference = features(counts[1], width, seed=1)
    options = {"kid_subsets": subsets, "kid_subset_size": size, "verbose": False}
    expected = fidelity.kid_features_to_metric(samples.double(), reference.double(), **options)
    found = kernel_distance(samples, reference, num_subsets=subsets, subset_size=size)
    assert found == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-5)


def test_one_subset_of_everything_is_the_textbook_estimate():
    samples, reference = features(9, 4, seed=0, shift=0.5), features(9, 4, seed=1)

    def kernel(u, v):
        return (float(u.double() @ v.double()) / 4 + 1) ** 3

    own = [
        kernel(u, v)
        for rows in (samples, reference)
        for i, u in enumerate(rows)
        for j, v in enumerate(rows)
        if i != j
    ]
    across = [kernel(u, v) for u in samples for v in reference]
    expected = sum(own) / (9 * 8) - 2 * sum(across) / (9 * 9)
    found = kernel_distance(samples, reference, num_subsets=1, subset_size=9)
    assert found == pytest.approx(expected, rel=1e-5)


def test_halves_of_one_set_are_close_and_may_be_below_zero():
    rows = features(4000, 16, seed=0)
    near = kernel_distance(rows[::2], rows[1::2], num_subsets=20, subset_size=500)
    far = kernel_distance(rows[::2] + 0.2, rows[1::2], num_subsets=20, subset_size=500)
    assert abs(near) < far / 20


def test_too_few_images_or_broken_ones_are_refused():
    rows = features(1000, 4, seed=0)
    with pytest.raises(DataError, match="subsets of 1,000 images, but there are 999 sample images"):
        kernel_distance(rows[:999], rows)
    with pytest.raises(DataError, match="there are 50 reference images"):
        kernel_distance(rows, rows[:50])
    broken = rows.clone()
    broken[3, 1] = float("nan")
    with pytest.raises(DataError, match="reference images hold NaN"):
        kernel_distance(rows, broken)
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(rows, rows, subset_size=1)
