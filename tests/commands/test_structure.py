import json

import numpy as np
import pytest
import torch
from PIL import Image

from srepa_ds.commands.structure import structure
from srepa_ds.data.shards import ShardDataset
from srepa_ds.encoders.teacher import load_teacher
from srepa_ds.errors import CheckpointError, ConfigError, DataError
from srepa_ds.metrics.structure import (
    correlation_decay_slope,
    local_distant_similarity,
    region_self_similarity,
    spatial_contrast,
)
from srepa_ds.noise import NoiseStream, normal


def measured(run):
    page = structure(run.config)
    assert page.read_text().count("<h2>") == 2
    return json.loads((run.folder / "structure.json").read_text())


def halves(folder, data, *, by_key):
    """Writes masks whose left half is foreground."""
    values = np.zeros((256, 256), dtype=np.uint8)
    values[:, :128] = 255
    indices = torch.arange(len(data))
    folder.mkdir()
    for index, key in zip(indices.tolist(), data.keys(indices), strict=True):
        path = folder / (f"{key}.png" if by_key else f"{index}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)


@torch.no_grad()
def test_a_teacher_alone_is_measured_image_by_image(small_run, tmp_path):
    data = ShardDataset(small_run().config.data.folder)
    halves(tmp_path / "masks", data, by_key=False)
    run = small_run(
        f"structure.masks={tmp_path}/masks", "structure.num_images=1000", "structure.batch_size=7"
    )
    document = measured(run)
    (layer,) = document["layers"]
    batch = data.read(torch.arange(len(data)))
    teacher = load_teacher(run.config.alignments[0].teacher, resolution=16, device="cpu")
    tokens, grid = teacher.tokens(batch.images).patches, (8, 8)
    masks = (torch.arange(64) % 8 < 4).expand(len(data), -1)
    expected = {
        "lds": local_distant_similarity(tokens, grid).mean(),
        "cds": correlation_decay_slope(tokens, grid).mean(),
        "srss": region_self_similarity(tokens, masks, grid).mean(),
        "rmsc": spatial_contrast(tokens).mean(),
    }
    for name, value in expected.items():
        assert layer["means"][name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6)
    assert layer["images"] == dict.fromkeys(expected, len(data))
    assert layer["grid"] == [8, 8]
    assert document["images_id"] == data.index.dataset_id
    (note,) = document["notes"]
    assert "holds no exported model" in note


@torch.no_grad()
def test_a_student_is_measured_at_the_depth_of_its_alignment(small_run):
    run = small_run("structure.num_images=1000", "structure.time=0.25")
    run.write_export()
    document = measured(run)
    teacher, block, projected = document["layers"]
    assert [block["layer"], projected["layer"]] == ["block 2", "projected"]
    batch = ShardDataset(run.config.data.folder).read(torch.arange(90))
    gaussian = normal(0, NoiseStream.NOISE, batch.sample_ids, (3, 16, 16), draw=1)
    x_t = 0.75 * (batch.images.float() / 127.5 - 1) + 0.25 * gaussian
    times = torch.full((90,), 0.25)
    (hidden,) = run.objective.sit(x_t, times, batch.labels, depths=(2,)).hidden
    for layer, tokens in ((block, hidden), (projected, run.objective.projectors[0](hidden))):
        value = local_distant_similarity(tokens, (8, 8)).mean().item()
        assert layer["means"]["lds"] == pytest.approx(value, rel=1e-4, abs=1e-6)
        assert layer["means"]["srss"] is None
    assert teacher["means"]["lds"] != block["means"]["lds"]
    assert document["notes"] == [
        "SRSS was not measured: it needs masks of the foreground (structure.masks)"
    ]
    assert document["weights_sha256"]


def test_a_normalised_target_is_a_layer_of_its_own(small_run):
    run = small_run("alignments.0.spatial_norm={gamma: 0.7}", "structure.num_images=12")
    run.write_export()
    layers = measured(run)["layers"]
    assert [layer["layer"] for layer in layers[1:]] == [
        "target of the losses", "block 2", "projected",
    ]  # fmt: skip
    # Tokens without their common part differ more.
    assert layers[1]["means"]["rmsc"] > layers[0]["means"]["rmsc"]
    assert layers[1]["images"]["lds"] == 12


def test_images_without_masks_or_regions_are_counted(small_run, tmp_path):
    data = ShardDataset(small_run().config.data.folder)
    folder = tmp_path / "masks"
    halves(folder, data, by_key=True)
    paths = sorted(folder.rglob("*.png"))
    for path in paths[:20]:
        path.unlink()
    Image.new("L", (16, 16), 255).save(paths[20])
    run = small_run(f"structure.masks={folder}", "structure.num_images=1000")
    document = measured(run)
    assert document["layers"][0]["images"]["srss"] == 69
    assert document["notes"][0] == "20 of 90 images have no mask, and no part in SRSS"
    for path in paths[20:]:
        Image.new("L", (16, 16), 255).save(path)
    assert "a quarter of their tokens" in measured(run)["notes"][1]


def test_what_cannot_be_measured_is_said(small_run, tmp_path):
    with pytest.raises(ConfigError, match="alignments"):
        structure(small_run("alignments=[]").config)
    with pytest.raises(DataError, match="no such folder of masks"):
        structure(small_run(f"structure.masks={tmp_path}/nowhere").config)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no mask of any of the 90 images"):
        structure(small_run(f"structure.masks={tmp_path}/empty").config)
    broken = small_run()
    broken.write_export()
    (broken.config.export_folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        structure(broken.config)
    assert not (broken.folder / "structure.json").exists()
