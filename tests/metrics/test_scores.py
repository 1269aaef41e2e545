from dataclasses import asdict

import pytest
import torch
from places import GOLDEN
from safetensors.torch import load_file

from srepa_ds.errors import DataError
from srepa_ds.metrics.scores import METRICS, Scores, inception_score, notes_on, score


@pytest.fixture(scope="module")
def two_sets():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(60, 5, generator=generator) + shift for shift in (0.0, 0.5))


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_yields_fields_of_scores(two_sets, name):
    values = METRICS[name](*two_sets)
    assert values
    measured = asdict(Scores(**values))
    assert {k: v for k, v in measured.items() if v is not None} == values
    # Every metric tells a set from its copy.
    assert METRICS[name](two_sets[0], two_sets[0]) != values


def test_scores_survive_json(two_sets):
    scores = score(*two_sets, class_accuracy=0.9)
    assert scores.frechet_distance > 0
    assert None not in asdict(scores).values()
    assert Scores.from_json(scores.to_json()) == scores


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
