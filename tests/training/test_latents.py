"""From a folder of photographs to a SiT trained on VAE latents, and what may go wrong between."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from builders import metrics_of
from latent_world import TEACHER, LatentWorld, write_latent_world, write_photographs
from PIL import Image
from ranks import run_function
from safetensors.torch import save_file
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
    assert "without images, and the teacher of alignments.0 looks at images" in message


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


@pytest.mark.slow
def test_data_without_latents_are_encoded_while_training(world, tmp_path):
    shutil.copytree(world.data / "train", tmp_path / "train")
    index = tmp_path / "train" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"latents": None}))
    silent = {"images_every_steps": 0, "heldout_every_steps": 0}
    # Two batches of the encoder for each of training.
    path = edited(world, tmp_path, monitor=silent, codec={"batch_size": 4})
    runs = [[str(path), f"run.folder={tmp_path / 'stored'}", "train.steps=2"]]
    runs += [[*runs[0], f"data.folder={tmp_path / 'train'}", f"run.folder={tmp_path / 'online'}"]]
    run_function(train_runs, 1, *runs)
    stored, online = (metrics_of(tmp_path / name)[0] for name in ("stored", "online"))
    # Stored latents are rounded to fp16.
    assert online["loss_total"] == pytest.approx(stored["loss_total"], rel=1e-3)


def test_heldout_losses_need_data(world, tmp_path, capfd):
    path = edited(world, tmp_path, monitor={"heldout": None})
    message = message_of(["train", str(path)], capfd)
    assert "monitor.heldout_every_steps: needs monitor.heldout" in message


@pytest.mark.slow
def test_a_model_goes_on_at_twice_the_size(world, tmp_path):
    """As from 256 to 512 px: every weight is taken over, only the positions are new."""
    prepare = yaml.safe_load(world.prepare.read_text())
    prepare |= {"image_size": 64, "output": str(tmp_path / "data")}
    (tmp_path / "prepare.yaml").write_text(yaml.safe_dump(prepare))
    assert run(["prepare", str(tmp_path / "prepare.yaml")]) == 0
    small, large = tmp_path / "small", tmp_path / "large"
    silent = {"images_every_steps": 0, "heldout_every_steps": 0}
    (tmp_path / "of_small").mkdir()
    before = edited(world, tmp_path / "of_small", monitor=silent)
    run_function(train_runs, 1, [str(before), f"run.folder={small}"])
    assert run(["export", str(before), f"run.folder={small}"]) == 0
    resampling = {"direction": "teacher_to_student", "mode": "bilinear"}
    alignment = yaml.safe_load(world.experiment.read_text())["alignments"][0]
    after = edited(
        world,
        tmp_path,
        data={"folder": str(tmp_path / "data" / "train")},
        model={"input_size": 16},
        alignments=[{**alignment, "resampling": resampling}],
        train={"steps": 1, "init_from": {"path": str(small / "export")}},
        optimizer={"learning_rate": 1e-30},
        monitor=silent,
    )
    run_function(train_runs, 1, [str(after), f"run.folder={large}"])
    exported, started = weights(small, 6), weights(large, 1)
    names = [name for name in started if name.startswith("ema/sit.")]
    assert len(names) > 20
    assert all(torch.equal(started[name], exported[name]) for name in names)


@pytest.mark.slow
def test_images_of_1024_pixels_have_4096_tokens(world, tmp_path):
    vae = write_vae(tmp_path / "vae", levels=4, sample_size=512)
    write_photographs(tmp_path / "images", images_per_class=1)
    codec = {"kind": "vae", "weights": str(vae), "tiled": True, "batch_size": 1}
    prepare = yaml.safe_load(world.prepare.read_text())
    prepare |= {
        "image_size": 1024,
        "source": {"kind": "image_folder", "path": str(tmp_path / "images")},
        "output": str(tmp_path / "data"),
        "holdout_fraction": 0.0,
        "latents": {"codec": codec, "batch_size": 1},
    }
    (tmp_path / "prepare.yaml").write_text(yaml.safe_dump(prepare))
    assert run(["prepare", str(tmp_path / "prepare.yaml")]) == 0
    dataset = ShardDataset(tmp_path / "data" / "train")
    assert dataset.read(torch.tensor([0])).moments.shape == (1, 8, 128, 128)
    spec = TEACHER | {"patch_size": 16, "input_size": 1024}
    spec["arguments"] = TEACHER["arguments"] | {"patch_size": 16}
    encoder = timm.create_model(
        spec["architecture"], img_size=1024, num_classes=3, **spec["arguments"]
    )
    save_file(encoder.state_dict(), tmp_path / "teacher.safetensors")
    teacher = {"spec": spec, "weights": str(tmp_path / "teacher.safetensors"), "dtype": "fp32"}
    alignment = yaml.safe_load(world.experiment.read_text())["alignments"][0]
    path = edited(
        world,
        tmp_path,
        data={"folder": str(dataset.folder)},
        codec=codec,
        model={"input_size": 128, "depth": 1},
        alignments=[{**alignment, "teacher": teacher}],
        train={"steps": 1, "batch_size": 2},
        monitor={
            "images_every_steps": 1,
            "num_images": 1,
            "num_steps": 1,
            "heldout_every_steps": 0,
        },
    )
    run_function(train_runs, 1, [str(path)])
    (line,) = (line for line in metrics_of(tmp_path / "run") if "loss_structural" in line)
    assert line["loss_structural"] > 0
