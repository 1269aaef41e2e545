import pytest
import torch
from places import GOLDEN
from safetensors.torch import load_file

from srepa_ds.errors import DataError
from srepa_ds.metrics.distances import squared_distances
from srepa_ds.metrics.manifold import neighbour_radii, precision_recall


@pytest.fixture(scope="module")
def worked_example():
    k = torch.arange(300, dtype=torch.float64)
    n = torch.arange(450, dtype=torch.float64)
    reference = torch.sin(1.7 * k**1.3).reshape(60, 5)
    samples = (0.8 * torch.sin(2.3 * n**1.2 + 0.4) + 0.6).reshape(90, 5)
    return samples.float(), reference.float()


@pytest.mark.parametrize("block_size", [7, 60, 4096])
def test_agrees_with_the_worked_example_for_any_block(worked_example, block_size):
    found = precision_recall(*worked_example, block_size=block_size)
    assert found.precision == 42 / 90
    assert found.recall == 6 / 60


@pytest.mark.parametrize("case", ["c0", "c1"])
@pytest.mark.parametrize("arithmetic", ["fp16", "fp32"])
def test_agrees_with_the_adm_evaluator(case, arithmetic):
    golden = load_file(GOLDEN / "metrics.safetensors")
    samples, reference = golden[f"{case}.sample"], golden[f"{case}.ref"]
    precision, recall = golden[f"{case}.precision_recall"].tolist()
    found = precision_recall(samples, reference, arithmetic=arithmetic)
    # The golden distances are fp16's, whose sums depend on the device; fp32 differs a bit more.
    points = 2.01 if arithmetic == "fp16" else 6.01
    assert found.precision == pytest.approx(precision, abs=points / len(samples))
    assert found.recall == pytest.approx(recall, abs=points / len(reference))


@pytest.mark.parametrize("num_neighbours", [1, 3, 5])
@pytest.mark.parametrize("block_size", [3, 11, 100])
def test_agrees_with_plain_loops(num_neighbours, block_size):
    generator = torch.Generator().manual_seed(0)
    # Whole numbers: every distance is exact, so borders are hit and ties happen.
    samples = torch.randint(0, 5, (29, 3), generator=generator).float()
    reference = torch.randint(2, 8, (23, 3), generator=generator).float()

    def radius(point, others):
        distances = sorted((point - other).square().sum().item() for other in others)
        return distances[num_neighbours]

    def covered(points, others):
        radii = [radius(other, others) for other in others]
        inside = [
            any((point - other).square().sum() <= r for other, r in zip(others, radii, strict=True))
            for point in points
        ]
        return sum(inside) / len(points)

    found = precision_recall(
        samples, reference, num_neighbours=num_neighbours, block_size=block_size
    )
    assert found.precision == pytest.approx(covered(samples, reference))
    assert found.recall == pytest.approx(covered(reference, samples))
    assert 0 < found.precision < 1
    assert 0 < found.recall < 1


def test_radii_do_not_depend_on_the_block():
    rows = torch.randn(41, 8, generator=torch.Generator().manual_seed(0))
    whole = neighbour_radii(rows, num_neighbours=3, block_size=200)
    for block_size in (1, 2, 10, 40):
        blocked = neighbour_radii(rows, num_neighbours=3, block_size=block_size)
        torch.testing.assert_close(blocked, whole, rtol=1e-5, atol=1e-5)


def test_identical_sets_cover_each_other():
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    found = precision_recall(rows, rows)
    assert (found.precision, found.recall) == (1, 1)


def test_half_precision_rounds_and_falls_back_where_it_overflows():
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(6, 32, generator=generator) for _ in range(2))
    exact = squared_distances(rows, columns)
    half = squared_distances(rows, columns, arithmetic="fp16")
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.5
    assert torch.equal(half, half.half().float())
    far = 300 * columns
    assert torch.equal(
        squared_distances(rows, far, arithmetic="fp16"), squared_distances(rows, far)
    )


def test_sets_too_small_or_broken_are_refused():
    good = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="more than 3 sample images, got 3"):
        precision_recall(good[:3], good)
    broken = good.clone()
    broken[2, 1] = float("inf")
    with pytest.raises(DataError, match="reference images hold NaN"):
        precision_recall(good, broken)
