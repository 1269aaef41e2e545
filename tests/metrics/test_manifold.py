import pytest
import torch
from places import GOLDEN
from plain_manifold import plain_half, plain_precision_recall
from safetensors.torch import load_file

from srepa_ds.errors import DataError
from srepa_ds.metrics import distances
from srepa_ds.metrics.distances import Block, squared_distances
from srepa_ds.metrics.manifold import neighbour_radii, precision_by_class, precision_recall


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


@pytest.mark.parametrize("width", [3, 64, 2048])
def test_half_distances_are_those_of_half_products(width):
    generator = torch.Generator().manual_seed(width)
    rows, columns = (torch.rand(70, width, generator=generator) * 2 for _ in range(2))
    found = squared_distances(rows, columns, arithmetic="fp16")
    plain = plain_half(rows, columns)
    # The sums of a product may be added in another order, which moves it to the next half number.
    spacing = 2.0 ** (torch.tensor(width * 4.0).log2().floor().item() - 10)
    assert (found - plain).abs().max() <= 2 * spacing
    assert (found == plain).double().mean() > 0.98


@pytest.mark.parametrize("exchanged", [False, True])
def test_half_sums_round_the_rows_norm_first(exchanged):
    # Whole numbers whose products are exact in half precision: only the sums round.
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randint(0, 30, (40, 9), generator=generator).float() for _ in range(2))
    rows, columns = 0.25 * rows, 0.5 * columns
    block = Block(rows, columns, torch.float16)
    if exchanged:
        found = torch.cat([part.distances_from_columns() for part in block.slices()]).T
        expected = plain_half(columns, rows)
    else:
        found, expected = (
            squared_distances(rows, columns, arithmetic="fp16"),
            plain_half(rows, columns),
        )
    assert torch.equal(found.float(), expected)


@pytest.mark.parametrize("held", [1, 77, 4_000_000])
@pytest.mark.parametrize("block_size", [20, 33, 200])
def test_each_block_that_overflows_falls_back_whole(monkeypatch, held, block_size):
    monkeypatch.setattr(distances, "_SLICE_ELEMENTS", held)
    generator = torch.Generator().manual_seed(1)
    # Multiples of 1/4 whose products are exact, a few of them so large that half squares overflow.
    samples, reference = (
        torch.randint(0, 9, (count, 6), generator=generator) / 4 + shift
        for count, shift in ((90, 0.25), (70, 0.0))
    )
    samples[[3, 47, 48]] += 150
    reference[[5, 66]] += 150
    found = precision_recall(samples, reference, arithmetic="fp16", block_size=block_size)
    in_reference, in_samples = plain_precision_recall(samples, reference, block_size)
    assert torch.equal(found.in_reference, in_reference)
    assert torch.equal(found.in_samples, in_samples)
    assert 0 < found.precision < 1


@pytest.mark.parametrize("arithmetic", ["fp16", "fp32"])
def test_agrees_with_whole_matrices(arithmetic):
    generator = torch.Generator().manual_seed(2)
    samples = torch.rand(500, 96, generator=generator) * 1.1
    reference = torch.rand(300, 96, generator=generator)
    found = precision_recall(samples, reference, arithmetic=arithmetic, block_size=120)
    in_reference, in_samples = plain_precision_recall(samples, reference, 120)
    # Half distances of equal rank change places; fp32 does not have them.
    share = 2 if arithmetic == "fp16" else 40
    assert (found.in_reference != in_reference).sum() <= share
    assert (found.in_samples != in_samples).sum() <= share
    assert 0 < found.precision < 1


def test_features_whose_squares_overflow_are_refused():
    huge = torch.full((9, 4), 1e30)
    with pytest.raises(DataError, match="overflow"):
        precision_recall(huge, huge)


def test_precision_by_class_is_the_share_of_each_class():
    inside = torch.tensor([True, False, True, True, False])
    # A number that no table has room for.
    labels = torch.tensor([2**60, 2**60, 3, 3, -1])
    assert list(precision_by_class(inside, labels).items()) == [(-1, 0.0), (3, 1.0), (2**60, 0.5)]


def test_sets_too_small_or_broken_are_refused():
    good = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="more than 3 sample images, got 3"):
        precision_recall(good[:3], good)
    broken = good.clone()
    broken[2, 1] = float("inf")
    with pytest.raises(DataError, match="reference images hold NaN"):
        precision_recall(good, broken)
