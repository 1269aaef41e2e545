import pytest

from srepa_ds.metrics.fdr import (
    VALIDATION_DISTANCES,
    mean_relative_distance,
    printed_ratios,
    relative_distance,
    relative_distances,
)


@pytest.mark.parametrize("extractor", VALIDATION_DISTANCES)
def test_validation_images_are_at_distance_one(extractor):
    distance = VALIDATION_DISTANCES[extractor]
    assert relative_distance(extractor, distance) == 1
    assert relative_distance(extractor, 3 * distance) == pytest.approx(3)


def test_other_extractors_have_no_relative_distance():
    assert relative_distance("dinov2-vit-b", 3.0) is None


def test_the_mean_needs_all_six():
    published = {
        "inception": 1.68,
        "fdr-convnext": 56.87,
        "fdr-dinov2": 14.19,
        "fdr-mae": 0.04,
        "fdr-siglip": 0.60,
        "fdr-clip": 5.60,
    }
    factors = (1, 2, 3, 4, 5, 12)
    distances = {
        name: factor * value
        for factor, (name, value) in zip(factors, published.items(), strict=True)
    }
    assert mean_relative_distance(distances) == pytest.approx(27 / 6)
    # Further encoders do not enter.
    assert mean_relative_distance({**distances, "dinov2-vit-b": 9.0}) == pytest.approx(27 / 6)
    for name in published:
        assert mean_relative_distance({k: v for k, v in distances.items() if k != name}) is None


def test_ratios_are_those_of_fifty_thousand_images():
    distances = dict(VALIDATION_DISTANCES)
    assert relative_distances(distances, num_images=49_999) == {}
    found = relative_distances(distances, num_images=50_000)
    assert found == {"fdr": dict.fromkeys(VALIDATION_DISTANCES, 1.0), "fdr6": 1.0}
    names = ("inception", "convnext", "dinov2", "mae", "siglip", "clip")
    assert printed_ratios(found) == {**{f"FDr-{name}": 1.0 for name in names}, "FDr6": 1.0}
    assert printed_ratios({}) == {}
    few = relative_distances({"inception": 3.36, "dinov2-vit-b": 9.0}, num_images=50_000)
    assert few == {"fdr": {"inception": 2.0}}
