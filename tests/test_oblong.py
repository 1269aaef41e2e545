"""Images that are not square, from their shards to a report: wide ones, and none is turned."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from builders import SmallWorld, metrics_of, write_shards
from ranks import run_function
from trainings import train_runs

from srepa_ds.cli import run
from srepa_ds.data.token_index import read_token_index
from srepa_ds.distributed import ranks
from srepa_ds.sampling.image_archive import ImageArchive
from srepa_ds.weights.exported import read_model

HEIGHT, WIDTH, GRID = 16, 24, (8, 12)
LIVE, STORED = "live", "stored"


@pytest.fixture(scope="module")
def oblong(small_world, tmp_path_factory) -> SmallWorld:
    """The small world with wide images; its teacher's weights were saved for square ones."""
    folder = tmp_path_factory.mktemp("oblong")
    write_shards(folder / "shards", num_samples=90, size=(HEIGHT, WIDTH))
    tree = yaml.safe_load(small_world.config.read_text())
    tree["run"]["folder"] = str(folder / LIVE)
    tree["data"]["folder"] = tree["evaluate"]["reference"] = str(folder / "shards")
    tree["model"]["input_size"] = [HEIGHT, WIDTH]
    teacher = tree["alignments"][0]["teacher"]
    teacher["spec"] = {**teacher["spec"], "input_size": [HEIGHT, WIDTH]}
    tree["evaluate"]["extractor"] = teacher
    (folder / "experiment.yaml").write_text(yaml.safe_dump(tree))
    return SmallWorld(folder)


@pytest.fixture(scope="module")
def trained(oblong) -> SmallWorld:
    """The same run with the teacher beside it and with its tokens stored."""
    stored = (f"run.folder={oblong.folder / STORED}", "alignments.0.stored_tokens=bf16")
    assert run(["prepare", str(oblong.config), "--teacher", *stored]) == 0
    ranks.close()
    common = (oblong.config, "train.steps=3", "checkpoint.every_steps=3")
    watched = ("monitor.images_every_steps=3", "monitor.num_images=10", "monitor.num_steps=2")
    run_function(train_runs, 1, [*common, *watched], [*common, *stored])
    return oblong


def loss_terms(folder: Path) -> list[dict[str, float]]:
    lines = metrics_of(folder)
    return [{k: v for k, v in line.items() if k.startswith("loss_")} for line in lines]


@pytest.mark.slow
def test_stored_tokens_train_as_the_teacher_does(trained):
    (index,) = (trained.folder / "shards" / "teachers").glob("*/index.json")
    assert read_token_index(index.parent).grid == GRID
    live, stored = (loss_terms(trained.folder / name) for name in (LIVE, STORED))
    assert len(live) == len(stored) == 3
    for one, other in zip(live, stored, strict=True):
        assert one.keys() >= {"loss_flow", "loss_total"}
        # bf16 moves a cosine near 0 by more than its own share.
        assert other == pytest.approx(one, rel=2e-3, abs=1e-4)
        assert all(np.isfinite(value) for value in one.values())


@pytest.mark.slow
def test_what_was_trained_is_exported_drawn_judged_and_reported(trained):
    config = str(trained.config)
    for command in ("export", "sample", "evaluate", "report"):
        assert run([command, config]) == 0
        ranks.close()
    folder = trained.folder / LIVE
    model = read_model(folder / "export").model
    assert model.config.grid == GRID
    (samples,) = folder.glob("samples/*")
    assert ImageArchive(samples / "samples.npz").shape == (64, HEIGHT, WIDTH, 3)
    (results,) = folder.rglob("results.json")
    scores = json.loads(results.read_text())
    assert all(np.isfinite(value) for value in scores["scores"].values())
    assert (folder / "report.html").stat().st_size > 10_000


def test_a_model_for_tall_images_is_refused(oblong, capfd):
    turned = f"model.input_size=[{WIDTH}, {HEIGHT}]"
    assert run(["train", str(oblong.config), turned]) == 2
    ranks.close()
    message = capfd.readouterr().err
    assert f"latents of shape (3, {HEIGHT}, {WIDTH}), but the model takes (3, {WIDTH}," in message


def test_a_teacher_of_squares_is_refused(oblong, capfd):
    squares = "alignments.0.teacher.spec.input_size=16"
    assert run(["train", str(oblong.config), squares]) == 2
    ranks.close()
    assert "set input_size to [height, width]" in capfd.readouterr().err
