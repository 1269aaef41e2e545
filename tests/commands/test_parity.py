"""Published scores beside measured ones, with the golden images and random weights of Inception."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from hub_stand_in import hub_stand_in
from inception_weights import settings_of
from places import GOLDEN, ROOT
from safetensors.torch import load_file

from srepa_ds.cli import run
from srepa_ds.commands.parity import Parity, ParityConfig, Row, compared
from srepa_ds.encoders import publications
from srepa_ds.encoders.publications import WEB_FILES, WebFile
from srepa_ds.errors import ConfigError
from srepa_ds.metrics.scores import Scores, printed_names
from srepa_ds.schema import load_section, validated

SHIPPED = ROOT / "configs" / "parity.yaml"
COUNTS = {"sample": 6, "ref": 9}


@pytest.fixture(scope="module")
def golden():
    found = load_file(GOLDEN / "inception.safetensors")
    kinds = ("images", "pool3", "spatial", "logits_without_bias")
    return {
        (name, kind): found[f"s64.{name}.{kind}"][:count]
        for name, count in COUNTS.items()
        for kind in kinds
        if f"s64.{name}.{kind}" in found
    }


def plain_frechet(first, second):
    """Returns the distance of few samples: a nuclear norm in place of a large square root."""
    (a, mean_a), (b, mean_b) = (
        ((x - x.mean(0)) / math.sqrt(len(x) - 1), x.mean(0))
        for x in (first.double(), second.double())
    )
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return (
        (mean_a - mean_b).square().sum() + a.square().sum() + b.square().sum() - 2 * cross
    ).item()


def plain_inception_score(logits):
    p = logits.double().softmax(1)
    return math.exp((p * (p.log() - p.mean(0).log())).sum(1).mean())


@pytest.fixture(scope="module")
def published(golden):
    return {
        "frechet_distance": plain_frechet(golden["sample", "pool3"], golden["ref", "pool3"]),
        "spatial_frechet_distance": plain_frechet(
            golden["sample", "spatial"], golden["ref", "spatial"]
        ),
        "inception_score": plain_inception_score(golden["sample", "logits_without_bias"]),
    }


@pytest.fixture
def config(golden, published, inception_file, tmp_path):
    """A file as the shipped one, of small sets."""
    for name in COUNTS:
        np.savez(tmp_path / f"{name}.npz", arr_0=golden[name, "images"].numpy())
    tree = {
        "kind": "parity",
        "evaluate": {
            "samples": str(tmp_path / "sample.npz"),
            "reference": str(tmp_path / "ref.npz"),
            "extractor": settings_of(inception_file),
            "batch_size": 4,
        },
        "published": published,
        "tolerance": {name: 1e-4 * abs(value) for name, value in published.items()},
    }
    path = tmp_path / "parity.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.slow
def test_scores_that_agree(config, capfd):
    assert run(["parity", str(config)]) == 0
    heading, head, *rows, summary = capfd.readouterr().out.splitlines()
    assert heading.startswith("6 images of ")
    assert head.split() == ["published", "measured", "difference", "tolerance"]
    assert [row.split()[0] for row in rows] == ["FID", "sFID", "IS"]
    assert [row.split()[-1] for row in rows] == ["OK"] * 3
    assert summary == "all agree"


@pytest.mark.slow
def test_a_score_that_is_off_gives_code_1(config, published, capfd):
    only = "inception_score"
    wrong = published[only] + 0.01
    tree = yaml.safe_load(config.read_text())
    tree |= {"published": {only: wrong}, "tolerance": {only: 0.005}}
    config.write_text(yaml.safe_dump(tree))
    assert run(["parity", str(config)]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[2].split() == ["IS", f"{wrong:.5f}", f"{published[only]:.5f}", "-0.01000",
                                "0.005", "off"]  # fmt: skip
    assert lines[-1] == "1 of 1 are off"
    assert run(["parity", str(config), "tolerance.inception_score=0.02"]) == 0


def test_rows_are_compared_within_their_tolerance():
    names = printed_names("inception")
    scores = Scores(frechet_distance=3.944, precision=0.8271, recall=math.nan)
    asked = {"recall": 0.5, "precision": 0.8265, "frechet_distance": 3.9425}
    tolerance = {"recall": 1.0, "precision": 0.0005, "frechet_distance": 0.002}
    rows = compared(asked, tolerance, scores, names=names)
    assert [(row.name, row.agrees) for row in rows] == [
        ("FID", True),
        ("precision", False),
        ("recall", False),
    ]
    found = Parity("images", rows)
    assert not found.agrees
    assert str(found).splitlines()[-1] == "2 of 3 are off"
    assert Parity("images", rows[:1]).agrees
    assert Row("x", 1.0, 1.5, 0.5).agrees


def test_the_shipped_file_asks_for_adm_s_published_scores():
    config = load_section(ParityConfig, SHIPPED)
    assert config.published == {
        "frechet_distance": 3.94256,
        "spatial_frechet_distance": 6.14043,
        "inception_score": 215.836,
        "precision": 0.8265,
        "recall": 0.5309,
    }
    assert config.evaluate.num_manifold_images == 10_000
    assert config.evaluate.distance_arithmetic is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tolerance": {"recall": 0.1}}, "name different scores: frechet_distance"),
        ({"published": {}, "tolerance": {}}, "published"),
        ({"published": {"fid": 1.0}, "tolerance": {"fid": 1.0}}, "unknown score 'fid'"),
        ({"evaluate": {"draw": True}}, "evaluate.draw must be false"),
        ({"evaluate": {"samples": None}}, "evaluate.samples is required"),
        ({"evaluate": {"further_extractors": [{"name": "fdr-mae"}]}}, "leave them out"),
    ],
)
def test_faults_of_the_configuration(changes, words):
    tree = yaml.safe_load(SHIPPED.read_text())
    merged = {
        key: {**tree[key], **value} if key == "evaluate" else value
        for key, value in changes.items()
    }
    with pytest.raises(ConfigError) as caught:
        validated(ParityConfig, tree | merged, source="test")
    assert words in str(caught.value)


def test_its_files_are_fetched_by_name(monkeypatch, tmp_path, golden, capfd):
    """And are found by name then; the weights that come are not Inception's, which is noticed."""
    monkeypatch.setenv("SREPA_FETCHED", str(tmp_path / "fetched"))
    monkeypatch.chdir(tmp_path)
    names = {"adm-imagenet256-samples": "sample", "adm-imagenet256": "ref"}
    with hub_stand_in() as web:
        for name, kind in names.items():
            np.savez(tmp_path / "x.npz", arr_0=golden[kind, "images"].numpy())
            path = f"/{WEB_FILES[name].name}"
            web.web[path] = (tmp_path / "x.npz").read_bytes()
            monkeypatch.setitem(publications.WEB_FILES, name, WebFile(f"{web.address}{path}"))
        web.web["/weights.pth"] = b"others"
        inception = WebFile(f"{web.address}/weights.pth", "0" * 64, 6)
        monkeypatch.setitem(publications.WEB_FILES, "inception", inception)
        assert run(["fetch", str(SHIPPED), "--dry-run"]) == 0
        assert not (tmp_path / "fetched").exists()
        listed = capfd.readouterr().out
        assert run(["fetch", str(SHIPPED)]) == 2
        assert "weights.pth: damaged on its way" in capfd.readouterr().err
    settings = [line.split()[0] for line in listed.splitlines()]
    assert settings == ["evaluate.samples", "evaluate.reference", "evaluate.extractor"]
    assert listed.count("its publisher states no hash") == 2
    noted = json.loads((tmp_path / "fetched/fetched.json").read_text())["fetched"]
    assert len(noted) == 2
    assert run(["parity", str(SHIPPED)]) == 2
    assert "'inception'" in capfd.readouterr().err
