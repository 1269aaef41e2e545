"""A sweep in a small world: its points, its files, and what a kill and a second call leave."""

import base64
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from builders import objective_of, pieces_of, randomised
from kills import killed_at
from PIL import Image
from ranks import run_function

from srepa_ds import files
from srepa_ds.checkpoint.saving import save
from srepa_ds.commands import sweep as command
from srepa_ds.commands.evaluate import evaluate
from srepa_ds.commands.export import export
from srepa_ds.commands.sample import sample
from srepa_ds.commands.sweep import sweep
from srepa_ds.config.experiment import load_config
from srepa_ds.distributed import ranks
from srepa_ds.errors import ConfigError, DataError, OutputError
from srepa_ds.evaluation.sweep_rows import SweepRow, best_first, read_rows, write_rows
from srepa_ds.model.sit import SiT
from srepa_ds.schema import to_tree
from srepa_ds.weights.exported import write_model

FEW = ("sweep.num_samples=20", "sample.batch_size=8")


@pytest.fixture(autouse=True)
def _alone():
    yield
    ranks.close()


@pytest.fixture
def experiment(small_world, tmp_path):
    """Returns a maker of experiments whose exported model has random weights."""

    def make(*overrides):
        config = load_config(small_world.config, [f"run.folder={tmp_path / 'run'}", *overrides])
        if not config.export_folder.exists():
            model = randomised(SiT(config.model), scale=0.1)
            provenance = {"checkpoint": "none", "step": 5, "weights": "ema"}
            tree = to_tree(config)
            folder = config.export_folder
            write_model(folder, model.state_dict(), config=tree, provenance=provenance)
        return config

    return make


def distance_of(row: SweepRow) -> float:
    return row.scores["frechet_distance"]


def scores_of(folder: Path) -> dict[str, float]:
    return {row.described: distance_of(row) for row in read_rows(folder)}


def pictures_of(page: Path) -> list[Image.Image]:
    found = []

    class Pictures(HTMLParser):
        def handle_starttag(self, tag, attrs):
            values = dict(attrs)
            if tag == "img" and values["alt"].startswith("images of"):
                data = base64.b64decode(values["src"].partition(",")[2])
                found.append(Image.open(io.BytesIO(data)))

    Pictures().feed(page.read_text())
    return found


@pytest.mark.slow
def test_each_point_has_the_score_of_its_own_sample_set(experiment, tmp_path, caplog):
    caplog.set_level("INFO", "srepa_ds")
    config = experiment("sweep.num_steps=[2, 3]", "sweep.cfg_scale=[1, 2.5]", *FEW)
    folder = sweep(config)
    assert folder == tmp_path / "run" / "sweep"
    found = scores_of(folder)
    assert len(set(found.values())) == 4
    drawn = ("sample.num_samples=20", "sample.batch_size=8", f"sample.folder={tmp_path}/one")
    alone = experiment("sample.num_steps=3", "sample.cfg_scale=2.5", *drawn)
    of_set = evaluate(experiment(f"evaluate.samples={sample(alone)}"))
    assert found["ema, euler_maruyama, 3 steps, scale 2.5"] == pytest.approx(
        of_set.frechet_distance, rel=1e-6
    )
    said = "\n".join(caplog.messages)
    assert re.search(
        r"point 3 of 4: ema, euler_maruyama, 3 steps, scale 1: FD-vit.* \d\.\d+, ", said
    )
    assert re.search(r"point 1 of 4: .* left\)", said)
    best = min(found, key=found.__getitem__)
    assert re.search(rf"best of 4 points by FD-vit.*: {re.escape(best)}: ", said)


@pytest.mark.slow
def test_its_files_show_the_best_first(experiment):
    folder = sweep(experiment("sweep.num_steps=[2, 3]", "sweep.cfg_scale=[1, 2.5]", *FEW))
    rows = read_rows(folder)
    names = {f"{row.picture}" for row in rows} | {"sweep.json", "sweep.md", "sweep.html"}
    assert {path.name for path in folder.iterdir()} == names
    best = min(rows, key=lambda row: row.scores["frechet_distance"])
    lines = (folder / "sweep.md").read_text().splitlines()
    assert "| NFE | FD-" in lines[0]
    assert lines[2].startswith(f"| **ema** | **euler_maruyama** | **{best.num_steps}** |")
    assert len(lines) == 6
    values = [float(line.split("|")[7].strip(" *")) for line in lines[2:]]
    assert values == sorted(values)
    page = (folder / "sweep.html").read_text()
    assert f"<td><b>{best.num_steps}</b></td>" in page
    assert "against guidance scale, 2 lines" in page
    pictures = pictures_of(folder / "sweep.html")
    # Sixteen images of 16 px, eight in a row, three times as large.
    assert [picture.size for picture in pictures] == [(8 * 48, 2 * 48)] * 4
    # A guided call evaluates the model twice; the last of the SDE's steps is a call as well.
    calls = {(row.num_steps, row.cfg_scale): row.evaluations for row in rows}
    assert calls == {(2, 1.0): 2, (3, 1.0): 3, (2, 2.5): 4, (3, 2.5): 6}


def test_without_guidance_its_interval_is_drawn_once(experiment):
    lists = ("sweep.cfg_scale=[1, 2]", "sweep.intervals=[[0, 1], [0, 0.4]]", "sample.num_steps=2")
    folder = sweep(experiment(*lists, *FEW))
    assert sorted(scores_of(folder)) == [
        "ema, euler_maruyama, 2 steps, scale 1",
        "ema, euler_maruyama, 2 steps, scale 2",
        "ema, euler_maruyama, 2 steps, scale 2 in [0, 0.4]",
    ]
    # The point without guidance begins both lines.
    assert "against guidance scale, 2 lines" in (folder / "sweep.html").read_text()


@pytest.mark.slow
def test_a_second_call_draws_only_what_is_new(experiment, monkeypatch):
    drawn = []

    def counting(drawing, rank, original=command.drawn_blocks):
        drawn.append(drawing.sampler.num_steps)
        return original(drawing, rank)

    monkeypatch.setattr(command, "drawn_blocks", counting)
    folder = sweep(experiment("sweep.num_steps=[2, 3]", *FEW))
    first = scores_of(folder)
    sweep(experiment("sweep.num_steps=[4, 3]", *FEW))
    assert drawn == [2, 3, 4]
    # Rows of other calls stay, and the pages show those of this one.
    assert scores_of(folder).items() > first.items()
    assert len((folder / "sweep.md").read_text().splitlines()) == 4
    sweep(experiment("sweep.num_steps=[3]", "sweep.num_samples=24", "sample.batch_size=8"))
    sweep(experiment("sweep.num_steps=[3]", "sample.seed=1", *FEW))
    sweep(experiment("sweep.num_steps=[3]", "evaluate.distance_arithmetic=fp16", *FEW))
    assert drawn == [2, 3, 4, 3, 3, 3]
    assert len(read_rows(folder)) == 6


@pytest.mark.slow
def test_a_kill_loses_at_most_one_point(experiment, tmp_path):
    config = experiment("sweep.num_steps=[1, 2]", *FEW)
    expected = scores_of(sweep(config))
    ranks.close()
    folder, found, moment = tmp_path / "killed", [], 1
    killed = experiment("sweep.num_steps=[1, 2]", f"sweep.folder={folder}", *FEW)
    while killed_at(moment, lambda: sweep(killed), folder):
        found.append(len(read_rows(folder)))
        # Every fifth is enough, and takes a fifth of the time.
        moment += 5
    assert set(found) >= {0, 1}
    assert found == sorted(found)
    assert scores_of(folder) == expected
    sweep(killed)
    assert not list(folder.glob("*.partial"))


@pytest.mark.slow
def test_two_ranks_find_what_one_does(small_world, experiment, tmp_path):
    settings = ["sweep.num_steps=[1, 2]", *FEW]
    alone = scores_of(sweep(experiment(*settings)))
    place = [f"run.folder={tmp_path}/run", f"sweep.folder={tmp_path}/two"]
    run_function(sweep_here, 2, str(small_world.config), [*place, *settings])
    together = scores_of(tmp_path / "two")
    assert together == pytest.approx(alone, rel=1e-6)
    pages = [
        pictures_of(folder / "sweep.html") for folder in (tmp_path / "two", tmp_path / "run/sweep")
    ]
    assert [p.tobytes() for p in pages[0]] == [p.tobytes() for p in pages[1]]


def sweep_here(config: str, overrides: list[str]) -> None:
    """Sweeps on this rank."""
    sweep(load_config(Path(config), overrides))


@pytest.mark.parametrize("text", ["[1, 2]", "{", '{"rows": [{"weights": 3}]}'])
def test_a_damaged_document_is_named_and_left_alone(experiment, tmp_path, text):
    (tmp_path / "run" / "sweep").mkdir(parents=True)
    path = tmp_path / "run" / "sweep" / "sweep.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"sweep\.json: cannot be read .*; remove it, or choose"):
        sweep(experiment("sweep.num_steps=[1]", *FEW))
    assert path.read_text() == text


def test_averages_come_straight_from_a_checkpoint(small_world, tmp_path):
    given = (f"run.folder={tmp_path}/run", "sample.num_steps=2", *FEW)
    config = load_config(small_world.config, [*given, "sweep.weights=[ema, master]"])
    pieces = []
    for seed, kind in enumerate(("master", "exp_avg", "exp_avg_sq", "ema")):
        weights = randomised(objective_of(config), seed=seed, scale=0.1).named_parameters()
        pieces += pieces_of(dict(weights), kind=kind)
    state = {"step": 5, "adam_step": 5, "config": to_tree(config)}
    save(config.run_folder.checkpoints, step=5, pieces=pieces, state=state, rank=0)
    rows = {row.weights: distance_of(row) for row in read_rows(sweep(config))}
    assert list(rows) == ["ema", "master"]
    assert rows["ema"] != rows["master"]
    ranks.close()
    # The same as of the weights that are exported first.
    alone = load_config(
        small_world.config,
        [*given, "export.weights=master", "sweep.num_steps=[2]", f"sweep.folder={tmp_path}/alone"],
    )
    export(alone)
    (row,) = read_rows(sweep(alone))
    assert (row.weights, distance_of(row)) == ("master", pytest.approx(rows["master"], rel=1e-6))


def test_two_sweeps_at_once_say_who_was_first(experiment, tmp_path):
    (tmp_path / "run" / "sweep").mkdir(parents=True)
    with (
        files.locked(tmp_path / "run" / "sweep"),
        pytest.raises(OutputError, match=rf"process \({os.getpid()}: .*is sweeping into"),
    ):
        sweep(experiment("sweep.num_steps=[1]", *FEW))


def test_lost_pictures_become_a_note(experiment):
    config = experiment("sweep.num_steps=[1, 2]", *FEW)
    folder = sweep(config)
    (folder / read_rows(folder)[0].picture).unlink()
    sweep(config)
    page = (folder / "sweep.html").read_text()
    assert "No images of ema, euler_maruyama, 1 steps, scale 1" in page
    assert len(pictures_of(folder / "sweep.html")) == 1


def test_without_its_section_nothing_is_swept(small_world):
    with pytest.raises(ConfigError, match="sweep: is required to sweep"):
        sweep(load_config(small_world.config))


def test_a_row_keeps_its_scores_through_the_document(tmp_path):
    row = SweepRow(
        weights="ema", solver="heun", num_steps=3, cfg_scale=1.5, interval=(0.0, 0.7),
        scores={"frechet_distance": 1.25}, evaluations=9, seconds=2.0, digest="a" * 64,
        measured_with={"num_images": 20, "extractors": {"one": {"width": 3}}},
    )  # fmt: skip
    write_rows(tmp_path, [row])
    assert read_rows(tmp_path) == (row,)
    assert json.loads((tmp_path / "sweep.json").read_text())["rows"][0]["interval"] == [0.0, 0.7]
    unscored = row.model_copy(update={"scores": {"precision": 0.5}})
    assert best_first([unscored, row]) == [row, unscored]
