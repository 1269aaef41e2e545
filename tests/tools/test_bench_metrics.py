import json
import subprocess
import sys

import pytest
from places import ROOT

TOOL = ROOT / "tools" / "bench_metrics.py"
SMALL = ("--images", "150", "--reference", "120", "--width", "32")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(TOOL.parent)
    import bench_metrics

    return bench_metrics


def run(*arguments):
    command = [sys.executable, str(TOOL), *SMALL, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_scipy_and_ours_agree_on_the_same_features(bench):
    sets = [bench.features("pooled", count, 24, seed=count) for count in (300, 200)]
    kept = [{"pooled": bench.FeatureSet(rows=rows)} for rows in sets]
    ours = bench.measure(*kept, metrics=["frechet"]).scores.frechet_distance
    assert ours == pytest.approx(bench.by_scipy(*sets), rel=1e-6)


def test_a_row_of_everything_has_every_score():
    row = json.loads(run("--row", "all scores"))
    assert row["seconds"] > 0
    assert row["peak"] > 0
    assert {"frechet_distance", "precision", "kernel_distance", "inception_score"} <= set(
        row["values"]
    )


@pytest.mark.slow
def test_each_row_is_printed():
    lines = run().splitlines()
    assert [line[:26].strip() for line in lines[1:6]] == [
        "frechet", "spatial_frechet", "inception_score", "precision_recall", "kernel_distance",
    ]  # fmt: skip
    assert all("GB in all" in line for line in lines[1:])
    for name in ("frechet", "spatial_frechet"):
        ours, theirs = (
            next(line for line in lines if line[:26].strip() == label).split("features: ")[1]
            for label in (name, f"{name} by scipy")
        )
        assert theirs.startswith(f"{name}_distance ")
        assert theirs == ours
