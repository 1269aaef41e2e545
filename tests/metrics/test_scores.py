from dataclasses import asdict

import pytest
import torch
from places import GOLDEN
from safetensors.torch import load_file

from srepa_ds.errors import DataError
from srepa_ds.metrics.scores import (
    METRICS,
    Conventions,
    FeatureSet,
    Scores,
    check_counts,
    inception_score,
    measure,
    notes_on,
    printed_names,
    score,
)


@pytest.fixture(scope="module")
def two_sets():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(60, 5, generator=generator) + shift for shift in (0.0, 0.5))


SMALL = Conventions(subset_size=20, num_subsets=5, split_size=25)


def collected(rows):
    sizes = {"pooled": rows, "spatial": rows.square(), "logits": rows}
    return {kind: FeatureSet(rows=features) for kind, features in sizes.items()}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_yields_the_fields_it_promises(two_sets, name):
    samples, reference = (collected(rows) for rows in two_sets)
    found = measure(samples, reference, metrics=[name], conventions=SMALL).scores
    measured = {k for k, v in asdict(found).items() if v is not None}
    assert measured == set(METRICS[name].fields)
    # Every metric that compares tells a set from its copy.
    copy = measure(reference, reference, metrics=[name], conventions=SMALL).scores
    assert copy != found


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_takes_what_its_row_says(two_sets, name):
    row = METRICS[name]
    samples, reference = (collected(rows) for rows in two_sets)
    expected = measure(samples, reference, metrics=[name], conventions=SMALL)
    kept = [
        {
            row.features: features[row.features]
            if row.takes_rows
            else FeatureSet(statistics=features[row.features].need_statistics())
        }
        for features in (samples, reference)
    ]
    if not row.takes_reference:
        kept[1] = {}
    found = measure(*kept, metrics=[name], conventions=SMALL)
    assert found.scores == expected.scores


def test_all_scores_at_once_survive_json(two_sets):
    samples, reference = (collected(rows) for rows in two_sets)
    found = measure(samples, reference, metrics=METRICS, class_accuracy=0.9, conventions=SMALL)
    assert None not in asdict(found.scores).values()
    assert Scores.from_json(found.scores.to_json()) == found.scores
    assert found.in_reference.double().mean() == found.scores.precision
    assert score(*two_sets).precision == found.scores.precision


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("frechet", (1, 9), "at least 2 sample images, got 1"),
        ("spatial_frechet", (2, 1), "at least 2 reference images, got 1"),
        ("inception_score", (0, 0), "at least 1 sample image, got 0"),
        ("precision_recall", (9, 3), "more than 3 reference images, got 3"),
        ("kernel_distance", (1000, 999), "there are 999 reference images"),
    ],
)
def test_each_metric_says_that_images_are_too_few(name, sizes, message):
    with pytest.raises(DataError, match=message):
        check_counts([name], samples=sizes[0], reference=sizes[1])
    check_counts([name], samples=1000, reference=1000)


def test_every_score_has_a_name_per_extractor():
    names = set(asdict(Scores()))
    assert set(printed_names("inception")) == set(printed_names("dinov2-b")) == names
    assert printed_names("inception")["frechet_distance"] == "FID"
    assert printed_names("dinov2-b")["frechet_distance"] == "FD-dinov2-b"


def test_what_was_not_measured_is_not_written(two_sets):
    scores = score(*two_sets, metrics=["frechet"])
    assert "recall" not in scores.to_json()
    assert Scores.from_json(scores.to_json()) == scores


@pytest.mark.parametrize("text", ["", "[1]", '{"fid": 3}'])
def test_other_json_is_refused(text):
    with pytest.raises(DataError, match="scores"):
        Scores.from_json(text)


def test_inception_score_of_the_worked_example():
    logits = 3 * torch.sin(0.05 * torch.arange(6000, dtype=torch.float64)).reshape(200, 30)
    assert inception_score(logits.float(), split_size=50).item() == pytest.approx(
        1.304877, abs=1e-5
    )


@pytest.mark.parametrize("case", ["c0", "c1"])
def test_inception_score_of_the_adm_evaluator(case):
    golden = load_file(GOLDEN / "metrics.safetensors")
    found = inception_score(golden[f"{case}.logits"], split_size=500)
    expected = golden[f"{case}.inception_score_split500"].item()
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_inception_score_ends_are_one_and_the_number_of_classes():
    assert inception_score(torch.zeros(20, 7)).item() == pytest.approx(1)
    # Certain to the point where probabilities underflow, and one class never predicted.
    certain = torch.eye(7)[torch.arange(18) % 6] * 1e4
    assert inception_score(certain).item() == pytest.approx(6, rel=1e-5)


def test_too_few_images_for_a_covariance_are_noted():
    assert notes_on(samples=385, reference=385, width=384) == []
    few, real = notes_on(samples=64, reference=384, width=384)
    assert few.startswith("64 drawn images for features of width 384: at least 385 are needed")
    assert real.startswith("384 real images for features of width 384")
