"""The demo on a person's own folder of images."""

import json
import re
from pathlib import Path

import pytest
import torch
from latent_world import write_photographs
from PIL import Image
from safetensors.torch import save_file
from small_vae import write_vae

from srepa_ds.cli import run
from srepa_ds.commands.demo import CONFIGS, MODES
from srepa_ds.commands.teacher import TeacherTrainingConfig
from srepa_ds.config.experiment import config_from
from srepa_ds.config.own_images import look_at
from srepa_ds.encoders.described import spec_for, spec_of
from srepa_ds.encoders.table import TEACHERS
from srepa_ds.encoders.timm_models import create_encoder
from srepa_ds.errors import ConfigError
from srepa_ds.preparation.config import PrepareConfig
from srepa_ds.schema import validated


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "my $mall images"
    write_photographs(folder, images_per_class=12)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return write_vae(tmp_path_factory.mktemp("vae") / "vae")


def write_digits_teacher(path: Path) -> Path:
    spec = TEACHERS["digits-vit"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = create_encoder(
            spec.architecture, input_size=(16, 16), num_classes=10, arguments=spec.arguments
        )
    save_file(encoder.state_dict(), path)
    return path


@pytest.mark.slow
def test_the_whole_road_on_latents(photographs, vae, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    weights = write_digits_teacher(tmp_path / "teacher.safetensors")
    line = ["demo", "--data", str(photographs), "--size", "32", "--vae", str(vae)]
    line += ["--teacher", "digits-vit", "--teacher-weights", str(weights)]
    line += ["--steps", "3", "--images", "12", "--ranks", "1"]
    code = run(line)
    said = capfd.readouterr()
    assert code == 0, said.out + said.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == "my_mall_images-32-vae-digits-vit-srepa-mse"
    assert said.out.count("\n$ srepa-ds ") == 6
    assert (folder / "report.html").stat().st_size > 100_000
    assert json.loads((folder / "results.json").read_text())["scores"]["frechet_distance"] > 0
    with Image.open(next(folder.glob("samples/*/contact_sheet.png"))) as sheet:
        assert min(sheet.size) > 32


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("teacher", [None, "vit_tiny_patch16_224", "dinov2-vit-b"])
def test_its_configurations_are_valid(photographs, mode, teacher, tmp_path):
    (tmp_path / "weights.pt").touch()
    weights = tmp_path / "weights.pt" if teacher else None
    own = look_at(photographs, image_size=64, teacher=teacher, teacher_weights=weights)
    trees = own.trees(mode)
    assert ("teacher" in trees) == (teacher is None)
    prepare = validated(PrepareConfig, trees["prepare"], source="prepare")
    assert prepare.source.path == photographs
    if teacher is None:
        teaching = validated(TeacherTrainingConfig, trees["teacher"], source="teacher")
        assert teaching.encoder.resolved.num_classes == 3
    config = config_from(trees["experiment"], source="experiment")
    assert config.model.num_classes == 3
    assert config.model.grid == (8, 8)
    assert config.data.folder == prepare.output / "train"


def test_settings_of_own_images_need_them(capfd, vae):
    assert run(["demo", "--vae", str(vae)]) == 2
    assert "--vae need --data, a folder of images" in capfd.readouterr().err


REFUSED = {
    "no image": (["--data", "{empty}"], "image"),
    "a size that the grid does not divide": (
        ["--data", "{images}", "--size", "36"],
        "--size: gives latents of 36 places along a side",
    ),
    "weights without a model": (
        ["--data", "{images}", "--teacher-weights", "x.pt"],
        "--teacher-weights: needs --teacher",
    ),
    "weights that are not there": (
        ["--data", "{images}", "--teacher", "digits-vit", "--teacher-weights", "x.pt"],
        "--teacher-weights: x.pt: no such file",
    ),
    "weights that were not fetched": (
        ["--data", "{images}", "--teacher", "dinov2-vit-b"],
        "were not fetched",
    ),
    "too few images": (["--data", "{few}"], "--data: "),
    "no ViT": (["--data", "{images}", "--teacher", "resnet50"], "cannot be a teacher"),
    "no VAE": (["--data", "{images}", "--vae", "{empty}"], "not a readable AutoencoderKL"),
    "a model without weights": (
        ["--data", "{images}", "--teacher", "vit_tiny_patch16_224"],
        "timm publishes no weights",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_and_leaves_nothing(
    name, photographs, tmp_path, monkeypatch, capfd
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options, words = REFUSED[name]
    write_photographs(tmp_path / "few", images_per_class=3)
    places = {"empty": tmp_path / "empty", "images": photographs, "few": tmp_path / "few"}
    assert run(["demo", *(option.format(**places) for option in options)]) == 2
    said = capfd.readouterr().err
    assert re.search(re.escape(words), said)
    assert list((tmp_path / "here").iterdir()) == []


def test_a_refusal_keeps_the_configurations_of_an_earlier_demo(photographs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "my_mall_images-32-srepa-mse" / CONFIGS
    folder.mkdir(parents=True)
    (folder / "prepare.yaml").write_text("kind: prepare\n")
    assert run(["demo", "--data", str(photographs), "--steps", "0"]) == 2
    assert [path.name for path in folder.iterdir()] == ["prepare.yaml"]


def test_timm_s_models_describe_themselves():
    spec = spec_of("vit_small_patch16_dinov3")
    assert (spec.width, spec.patch_size, spec.num_prefix_tokens, spec.has_cls) == (384, 16, 5, True)
    known = spec_for("dinov2-vit-b")
    assert (known.input_size, known.input_size_per_256) == (224, None)
    assert spec_for("digits-vit") == TEACHERS["digits-vit"]
    with pytest.raises(ConfigError, match="cannot be a teacher"):
        spec_of("resnet50")
