"""The model card: what it says with and without scores and pictures, and that its commands run."""

import json
import re
import shlex
import sys

import pytest
import yaml
from builders import pieces_of
from huggingface_hub import ModelCard
from PIL import Image

from srepa_ds.checkpoint import saving
from srepa_ds.cli import run as run_command
from srepa_ds.commands.export import export
from srepa_ds.files import sha256_of
from srepa_ds.report.model_card import escaped, table
from srepa_ds.schema import to_tree
from srepa_ds.weights.exported import WEIGHTS, read_model


def save(made, step: int = 5) -> None:
    """Writes a checkpoint of a run."""
    weights = {name: value.detach() for name, value in made.objective.named_parameters()}
    pieces = [p for kind in ("master", "ema") for p in pieces_of(weights, kind=kind)]
    state = {"step": step, "adam_step": step, "config": to_tree(made.config)}
    folder = made.config.run_folder.checkpoints
    saving.save(folder, step=step, pieces=pieces, state=state, rank=0)


@pytest.fixture
def made(small_run):
    """A run with a checkpoint and nothing else."""
    run = small_run(name="digits")
    save(run)
    return run


def card_of(made) -> ModelCard:
    return ModelCard.load(made.config.export_folder / "README.md")


def scored(made) -> None:
    """Gives a run samples of its exported weights, with scores."""
    made.write_samples(checkpoint=sha256_of(made.config.export_folder / WEIGHTS))
    made.write_results()


def test_a_run_with_nothing_but_weights(made):
    folder = export(made.config)
    card = card_of(made)
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, "config.json", "README.md"}
    assert card.data.license == "other"
    assert card.data.library_name == "srepa_ds"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert {"sit", "srepa", "class-conditional"} <= {*card.data.tags}
    assert not card.data.eval_results
    for words in (
        "# digits",
        "no picture of samples yet",
        "There are none of these weights yet",
        "Its licence is not stated",
        "no filter for unsafe images",
        "sREPA-MSE: flow matching",
        "| trained by | not recorded |",
        r"vit\_tiny\_patch16\_224 at block 2",
    ):
        assert words in card.text, words
    assert read_model(folder).provenance["step"] == 5


def test_a_run_with_scores_and_samples(made):
    export(made.config)
    scored(made)
    made.write_documents()
    folder = export(made.config)
    card = card_of(made)
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found["precision"] == 0.625
    assert 12.3456 in found.values()
    assert card.data.model_name == "digits"
    for words in (
        "| 12.35 |",
        "| comparable | no, because the features are those of",
        "| solver | heun |",
        "![samples](samples.png)",
        "Samples of these weights",
        "torch 2.11",
    ):
        assert words in card.text, words
    with Image.open(folder / "samples.png") as image:
        assert image.size[0] > 100
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert first == {path.name: path.read_bytes() for path in export(made.config).iterdir()}


def test_scores_and_samples_of_other_weights_are_not_claimed(made):
    export(made.config)
    scored(made)
    results = made.config.run_folder.results
    document = json.loads(results.read_text())
    document["samples"]["checkpoint_sha256"] = "0" * 64
    results.write_text(json.dumps(document))
    (made.config.run_folder.samples(5) / "provenance.json").write_text(
        json.dumps(document["samples"])
    )
    folder = export(made.config)
    card = card_of(made)
    assert not card.data.eval_results
    assert "12.35" not in card.text
    assert "There are scores of other weights of this run" in card.text
    assert not (folder / "samples.png").exists()


def test_the_newest_picture_of_training_up_to_the_step_is_shown(made):
    pictures = made.config.run_folder.pictures
    pictures.mkdir()
    for step, colour in ((2, "red"), (4, "green"), (9, "blue")):
        Image.new("RGB", (8, 8), colour).save(pictures / f"step-{step:07d}.png")
    (pictures / "step-0000005.png").write_bytes(b"torn")
    folder = export(made.config)
    with Image.open(folder / "samples.png") as image:
        assert image.getpixel((0, 0)) == (0, 128, 0)
    assert "Drawn in training, at step 4." in card_of(made).text
    for path in pictures.iterdir():
        path.unlink()
    assert not (export(made.config) / "samples.png").exists(), "an old picture goes with its run"


def test_the_licence_is_a_setting(small_run):
    run = small_run("export.license=apache-2.0")
    save(run)
    export(run.config)
    card = card_of(run)
    assert card.data.license == "apache-2.0"
    assert "licence is not stated" not in card.text


def test_damaged_documents_of_the_run_are_left_out(made):
    files = made.config.run_folder
    files.results.write_text("{")
    files.environment.write_text("[]")
    files.samples(5).mkdir(parents=True)
    (files.samples(5) / "contact_sheet.png").write_bytes(b"no picture")
    (files.samples(5) / "provenance.json").write_text("{")
    export(made.config)
    assert "no picture of samples yet" in card_of(made).text


def test_names_cannot_add_markup(small_run):
    name = "<script>a|b`*_[x](y)\n# title"
    run = small_run(name=name)
    save(run)
    export(run.config)
    card = card_of(run)
    assert "<script>" not in card.text.replace(r"\<script\>", "")
    assert "\n# title" not in card.text
    assert escaped("a\nb | c") == r"a b \| c"
    assert table([("x", "1|2")]).endswith("| x | 1\\|2 |\n")
    block = (run.config.export_folder / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(block)["license"] == "other"


def test_its_commands_run(small_run, tmp_path, monkeypatch):
    """Runs the code of the card as it stands, with the exported folder in place of the name."""
    made = small_run("sample.source=checkpoint", f"sample.folder={tmp_path}/of-its-own")
    save(made)
    folder = export(made.config)
    monkeypatch.chdir(tmp_path)
    text = card_of(made).text.replace("OWNER/NAME", str(folder))
    python, draw, train = re.findall(r"```(?:python|sh)\n(.*?)```", text, re.DOTALL)
    before = dict(sys.modules["__main__"].__dict__)
    exec(compile(python, "card", "exec"), {"__name__": "card"})
    assert sys.modules["__main__"].__dict__ == before
    assert json.loads((tmp_path / "experiment.yaml").read_text()) == read_model(folder).config
    quick = ["sample.num_steps=1"]
    for line in draw.strip().splitlines():
        assert run_command([*shlex.split(line)[1:], *quick]) == 0
    assert list((tmp_path / "drawn").rglob("samples.npz"))
    assert not (tmp_path / "of-its-own").exists()
    for line in train.strip().splitlines():
        words = [*shlex.split(line)[1:], "train.steps=1", "checkpoint.every_steps=1"]
        assert run_command(["fetch" if "fetch" in words else "config", *words[1:]]) == 0
