import itertools
import json
import logging
import math
import os
import shutil

import numpy as np
import pytest
import torch
from places import ROOT
from torch.nn import functional as F

from srepa_ds import files
from srepa_ds.commands.teacher import (
    TeacherTrainingConfig,
    initialise,
    learning_rate,
    train_teacher,
)
from srepa_ds.data.augment import NUM_CHOICES, distorted
from srepa_ds.data.shard_file import shard_name
from srepa_ds.data.shard_index import DatasetDescription
from srepa_ds.data.shard_writer import ShardWriter
from srepa_ds.data.shards import ShardDataset
from srepa_ds.encoders.teacher import TEACHERS, TeacherConfig, build_encoder, load_teacher
from srepa_ds.encoders.teacher_folder import claimed
from srepa_ds.errors import ConfigError, DataError, OutputError, SRepaError
from srepa_ds.schema import to_tree, validated
from srepa_ds.trees import load_tree

CONFIG = ROOT / "configs" / "digits-teacher.yaml"


def write_shards(folder, *, count, first, num_classes=4, size=16):
    """Writes images whose class is the place of the bright quarter: an easy spatial task."""
    names = tuple(f"place {k}" for k in range(num_classes))
    described = DatasetDescription({"first": first}, (3, size, size), names)
    with ShardWriter(folder, description=described, samples_per_shard=64) as writer:
        for number in range(first, first + count):
            label = number % num_classes
            image = np.full((size, size, 3), number % 7, dtype=np.uint8)
            top, left = label // 2 * size // 2, label % 2 * size // 2
            image[top : top + size // 2, left : left + size // 2] = 255
            writer.add(image, label)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    write_shards(folder / "train", count=80, first=0)
    write_shards(folder / "heldout", count=30, first=80)
    return folder


def config_for(shards, output, **changes):
    places = {"train": shards / "train", "heldout": shards / "heldout", "output": output}
    small = {"steps": 25, "batch_size": 20, "warmup_steps": 3, "required_accuracy": 0.9}
    tree = load_tree(CONFIG) | {name: str(path) for name, path in places.items()} | small
    spec = to_tree(TEACHERS[tree["encoder"]["name"]]) | {"num_classes": 4}
    tree = {**tree, "encoder": {"spec": spec}, **changes}
    return validated(TeacherTrainingConfig, tree, source="test")


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    config = config_for(shards, tmp_path_factory.mktemp("made") / "new" / "teacher")
    return config, train_teacher(config)


def test_it_learns_and_loads_as_any_teacher(trained):
    config, accuracy = trained
    assert accuracy >= 0.9
    weights = config.output / "model.safetensors"
    teacher = load_teacher(
        TeacherConfig(spec=config.encoder.resolved, weights=weights, dtype="fp32"),
        resolution=16,
        device="cpu",
    )
    heldout = ShardDataset(config.heldout).read(torch.arange(30))
    found = teacher.features(heldout.images).logits.argmax(dim=1)
    assert (found == heldout.labels).float().mean().item() == pytest.approx(accuracy)
    tokens = teacher.tokens(heldout.images)
    assert tokens.patches.shape == (30, 64, 64)
    assert teacher.grid == (8, 8)
    assert tokens.cls is None


def test_the_report_tells_what_was_done(trained):
    config, accuracy = trained
    assert sorted(path.name for path in config.output.iterdir()) == [
        "model.safetensors",
        "teacher.json",
    ]
    report = json.loads((config.output / "teacher.json").read_text())
    assert report["heldout_accuracy"] == accuracy
    assert report["identity"]["spec"]["width"] == 64
    assert report["identity"]["steps"] == 25
    assert set(report["versions"]) == {"srepa_ds", "torch", "timm"}


def test_again_is_a_no_op_that_says_so(trained, caplog):
    config, accuracy = trained
    before = {path: path.stat().st_mtime_ns for path in config.output.iterdir()}
    with caplog.at_level(logging.INFO, logger="srepa_ds"):
        assert train_teacher(config) == accuracy
    assert "already trained with these settings" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in config.output.iterdir()}


def test_the_same_seed_gives_the_same_weights(shards, tmp_path):
    outputs = [tmp_path / name for name in ("a", "b", "c")]
    for output, seed, ambient in zip(outputs, (0, 0, 1), (1, 2, 1), strict=True):
        torch.manual_seed(ambient)
        train_teacher(config_for(shards, output, steps=2, seed=seed, required_accuracy=0.0))
    weights = [(output / "model.safetensors").read_bytes() for output in outputs]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_a_killed_training_is_done_again(trained, shards, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"half")
    accuracy = train_teacher(config_for(shards, tmp_path, steps=2, required_accuracy=0.0))
    assert 0 <= accuracy <= 1
    assert (tmp_path / "model.safetensors").stat().st_size > 1000


def test_other_settings_do_not_overwrite(trained, shards):
    config, _ = trained
    with pytest.raises(OutputError, match=r"other settings \(seed, steps differ\)"):
        train_teacher(config_for(shards, config.output, steps=24, seed=1))


def test_a_foreign_folder_is_left_alone(shards, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"not empty \(it holds config.json\)"):
        train_teacher(config_for(shards, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_that_another_training_holds_is_left_alone(shards, tmp_path):
    output = tmp_path / "teacher"
    with claimed(output):
        with pytest.raises(
            OutputError, match=rf"another process .* training a teacher in {output}"
        ):
            train_teacher(config_for(shards, output))
        assert list(output.iterdir()) == []
    assert not output.exists()


def test_damaged_shards_are_refused(shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "copy")
    path = copy / "heldout" / shard_name(0)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=rf"heldout/{shard_name(0)}: contents changed"):
        train_teacher(config_for(copy, tmp_path / "teacher"))
    assert not (tmp_path / "teacher").exists()


def test_a_place_that_cannot_be_written_to_is_named(shards, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=rf"cannot write {tmp_path}/file/teacher: \w"):
        train_teacher(config_for(shards, tmp_path / "file" / "teacher"))


def test_two_trainings_in_one_folder_say_who_was_first(shards, tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    with (
        files.locked(folder),
        pytest.raises(OutputError, match=rf"\({os.getpid()}: .*is training a teacher in"),
    ):
        train_teacher(config_for(shards, folder))
    assert not list(folder.iterdir())


def test_a_poor_teacher_is_not_saved(shards, tmp_path):
    with pytest.raises(SRepaError, match=r"less than the required 90\.0 %"):
        train_teacher(config_for(shards, tmp_path / "new" / "teacher", steps=1))
    assert list(tmp_path.iterdir()) == []


def test_data_that_does_not_fit_is_refused(shards, tmp_path):
    write_shards(tmp_path / "small", count=10, first=0, size=8)
    changes = {"heldout": str(tmp_path / "small")}
    with pytest.raises(DataError, match="give two parts of one data set"):
        train_teacher(config_for(shards, tmp_path / "out", **changes))
    spec = to_tree(TEACHERS["digits-vit"]) | {"num_classes": 7}
    with pytest.raises(ConfigError, match=r"spec\.num_classes: is 7, but .* holds 4 classes"):
        train_teacher(config_for(shards, tmp_path / "out", encoder={"spec": spec}))
    assert not (tmp_path / "out").exists()


def test_a_known_name_stands_for_its_spec(shards):
    config = validated(TeacherTrainingConfig, load_tree(CONFIG), source="test")
    assert config.encoder.resolved == TEACHERS["digits-vit"]
    encoder = {"name": "digits-vit", "spec": to_tree(config.encoder.resolved)}
    both = load_tree(CONFIG) | {"encoder": encoder}
    with pytest.raises(ConfigError, match="encoder: give exactly one of name and spec"):
        validated(TeacherTrainingConfig, both, source="test")


def test_initial_weights_follow_the_seed_alone(shards):
    spec = config_for(shards, "unused").encoder.resolved
    states = []
    for ambient, seed in ((0, 3), (1, 3), (1, 4)):
        torch.manual_seed(ambient)
        encoder = build_encoder(spec, resolution=16)
        initialise(encoder, grid=(8, 8), seed=seed)
        states.append(encoder.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(
        states[0]["blocks.0.attn.qkv.weight"], states[2]["blocks.0.attn.qkv.weight"]
    )
    places = states[0]["pos_embed"][0]
    distances = torch.cdist(places, places) + 100 * torch.eye(64)
    row, column = 3, 4
    nearest = distances[row * 8 + column].topk(4, largest=False).indices.tolist()
    assert sorted(nearest) == [row * 8 - 8 + column, row * 8 + 3, row * 8 + 5, row * 8 + 8 + column]


def test_learning_rate_rises_then_falls_to_zero(shards):
    config = config_for(shards, "unused", steps=100, warmup_steps=10, learning_rate=2.0)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (k + 1) for k in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0)
    assert all(first > second for first, second in itertools.pairwise(rates[10:]))


NONE = {"rotation": 0.0, "resize": 0.0, "slant": 0.0, "shift": 0.0}


def numbers(batch, size):
    return torch.sin(torch.arange(batch * 3 * size * size) * 0.1).reshape(batch, 3, size, size)


def test_no_distortion_changes_nothing():
    images = numbers(2, 9)
    choices = torch.full((2, NUM_CHOICES), 0.9)
    torch.testing.assert_close(distorted(images, choices, **NONE), images, atol=1e-5, rtol=0)


def test_shift_moves_by_pixels():
    images = numbers(2, 8)
    choices = torch.full((2, NUM_CHOICES), 0.5)
    choices[0, 3], choices[1, 4] = 1.0, 0.0
    moved = distorted(images, choices, **{**NONE, "shift": 2.0})
    right = F.pad(images[:1], (0, 2, 0, 0), mode="replicate")[..., 2:]
    up = F.pad(images[1:], (0, 0, 2, 0), mode="replicate")[..., :8, :]
    torch.testing.assert_close(moved, torch.cat((right, up)), atol=1e-5, rtol=0)


def test_rotation_by_a_right_angle():
    images = numbers(1, 8)
    choices = torch.full((1, NUM_CHOICES), 0.5)
    choices[0, 0] = 1.0
    turned = distorted(images, choices, **{**NONE, "rotation": math.pi / 2})
    torch.testing.assert_close(turned, images.rot90(1, (2, 3)), atol=1e-4, rtol=0)


def test_each_image_has_its_own_distortion():
    images = numbers(3, 8)
    choices = torch.rand(3, NUM_CHOICES, generator=torch.Generator().manual_seed(0))
    amounts = {"rotation": 0.3, "resize": 0.2, "slant": 0.2, "shift": 1.5}
    together = distorted(images, choices, **amounts)
    for k in range(3):
        alone = distorted(images[k : k + 1], choices[k : k + 1], **amounts)
        torch.testing.assert_close(together[k : k + 1], alone)
