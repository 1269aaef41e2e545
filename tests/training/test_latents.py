"""From a folder of photographs to a SiT trained on VAE latents, and what may go wrong between."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from builders import metrics_of
from latent_world import LatentWorld, write_latent_world
from PIL import Image
from ranks import run_function
from small_vae import write_vae
from trainings import train_runs

from srepa_ds.checkpoint.folder import step_folder
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.cli import run
from srepa_ds.data.shards import ShardDataset
from srepa_ds.run_folder import RunFolder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> LatentWorld:
    world = write_latent_world(tmp_path_factory.mktemp("photographs"))
    assert run(["prepare", str(world.prepare)]) == 0
    return world


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(step_folder(folder / "checkpoints", step))
    return {f"{k}/{n}": reader.tensor(k, n) for k in reader.kinds() for n in reader.names(k)}


def heldout_losses(folder: Path) -> dict[int, float]:
    lines = metrics_of(folder)
    return {
        line["step"]: line["heldout_flow_loss"] for line in lines if "heldout_flow_loss" in line
    }


@pytest.mark.slow
def test_the_whole_way_on_two_ranks(world, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    runs = [
        [f"run.folder={whole}"],
        [f"run.folder={resumed}", "train.steps=3"],
        [f"run.folder={resumed}"],
    ]
    run_function(train_runs, 2, *([str(world.experiment), *overrides] for overrides in runs))
    one, two = weights(whole, 6), weights(resumed, 6)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert heldout_losses(whole) == heldout_losses(resumed)
    assert sorted(heldout_losses(whole)) == [3, 6]

    sheet = next(RunFolder(whole).path.rglob("*0006*.png"))
    assert len(Image.open(sheet).convert("RGB").getcolors(1 << 24)) > 100

    single = tmp_path / "single"
    zero = "engine.deepspeed=ds_configs/zero0.json"
    run_function(train_runs, 1, [str(world.experiment), f"run.folder={single}", zero])
    one_rank, two_ranks = heldout_losses(single), heldout_losses(whole)
    assert list(one_rank.values()) == pytest.approx(list(two_ranks.values()), rel=1e-5)

    place = f"run.folder={whole}"
    for command in ("export", "sample", "evaluate"):
        assert run([command, str(world.experiment), place]) == 0
    (samples,) = whole.glob("samples/*/samples.npz")
    assert np.load(samples)["arr_0"].shape == (8, 32, 32, 3)
    codec = json.loads(samples.with_name("provenance.json").read_text())["codec"]
    assert codec["kind"] == "vae"
    assert codec["scale"] == 0.18215


def edited(world: LatentWorld, folder: Path, **sections) -> Path:
    tree = yaml.safe_load(world.experiment.read_text())
    tree["run"] = {"folder": str(folder / "run")}
    for name, values in sections.items():
        tree[name] = {**tree[name], **values} if isinstance(values, dict) else values
    path = folder / "edited.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def message_of(command: list[str], capfd) -> str:
    assert run(command) == 2
    return capfd.readouterr().err


def test_latents_of_another_encoder_are_refused(world, tmp_path, capfd):
    other = write_vae(tmp_path / "other", seed=5)
    path = edited(world, tmp_path, codec={"weights": str(other)})
    message = message_of(["train", str(path)], capfd)
    assert "its latents were made by another codec (encoder_sha256 is" in message
    assert "set codec.weights to the VAE they were encoded with" in message
    assert not (tmp_path / "run").exists()


def test_another_decoder_of_the_same_encoder_may_draw(world, tmp_path):
    from srepa_ds.codec.config import CodecConfig
    from srepa_ds.codec.table import build_codec
    from srepa_ds.training.latent_fit import fitting_latent_shape

    other = write_vae(tmp_path / "other", decoder_seed=5)
    codec = build_codec(CodecConfig(kind="vae", weights=other))
    assert fitting_latent_shape(ShardDataset(world.data / "train"), codec) == (4, 8, 8)


def without_images(world: LatentWorld, tmp_path: Path) -> Path:
    """Returns the same data with latents alone."""
    tree = yaml.safe_load(world.prepare.read_text()) | {"pixels": None}
    tree["output"] = str(tmp_path / "data")
    path = tmp_path / "prepare.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert run(["prepare", str(path)]) == 0
    return tmp_path / "data" / "train"


def test_a_teacher_needs_images(world, tmp_path, capfd):
    path = edited(world, tmp_path, data={"folder": str(without_images(world, tmp_path))})
    message = message_of(["train", str(path)], capfd)
    assert "holds latents and no images, and the teacher of alignments.0 looks at images" in message


@pytest.mark.slow
def test_plain_sit_trains_on_latents_alone(world, tmp_path):
    data = {"folder": str(without_images(world, tmp_path))}
    stored = {"kind": "stored", "scale": 0.18215}
    changes = {"data": data, "alignments": [], "monitor": {"images_every_steps": 0}}
    path = edited(world, tmp_path, **changes)
    tree = yaml.safe_load(path.read_text()) | {"codec": stored}
    path.write_text(yaml.safe_dump(tree))
    plain = edited(world, tmp_path, alignments=[], monitor={"images_every_steps": 0})
    runs = [[str(path), f"run.folder={tmp_path / 'stored'}"]]
    runs += [[str(plain), f"run.folder={tmp_path / 'plain'}"]]
    run_function(train_runs, 1, *runs)
    one, two = weights(tmp_path / "stored", 6), weights(tmp_path / "plain", 6)
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_stored_latents_cannot_be_looked_at(world, tmp_path, capfd):
    path = edited(world, tmp_path)
    tree = yaml.safe_load(path.read_text()) | {"codec": {"kind": "stored", "scale": 0.18215}}
    path.write_text(yaml.safe_dump(tree))
    message = message_of(["train", str(path)], capfd)
    assert "monitor.images_every_steps: needs images, and codec 'stored' cannot" in message


def test_data_without_latents_are_encoded_while_training(world, tmp_path, caplog):
    from srepa_ds.codec.config import CodecConfig
    from srepa_ds.codec.table import build_codec
    from srepa_ds.training.latent_fit import fitting_latent_shape

    shutil.copytree(world.data / "train", tmp_path / "train")
    index = tmp_path / "train" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"latents": None}))
    codec = build_codec(CodecConfig(kind="vae", weights=world.folder / "vae"))
    with caplog.at_level("INFO", logger="srepa_ds"):
        assert fitting_latent_shape(ShardDataset(tmp_path / "train"), codec) == (4, 8, 8)
    assert "images are encoded in every step" in caplog.text


def test_heldout_losses_need_data(world, tmp_path, capfd):
    path = edited(world, tmp_path, monitor={"heldout": None})
    message = message_of(["train", str(path)], capfd)
    assert "monitor.heldout_every_steps: needs monitor.heldout" in message
