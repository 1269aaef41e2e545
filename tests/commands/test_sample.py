"""Sampling as users run it: the same images for any number of ranks."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_function
from trainings import train_runs

from srepa_ds import files
from srepa_ds.commands.export import export
from srepa_ds.commands.sample import sample
from srepa_ds.config.experiment import load_config
from srepa_ds.data.shards import ShardDataset
from srepa_ds.distributed import ranks
from srepa_ds.errors import CheckpointError, ConfigError, OutputError
from srepa_ds.model.sit import SiT
from srepa_ds.preparation.share import EVERYTHING, Share
from srepa_ds.schema import to_tree
from srepa_ds.weights.exported import write_model


@pytest.fixture(scope="module")
def trained(small_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run_function(train_runs, 1, [small_world.config, f"run.folder={folder}", "train.steps=5"])
    export(load_config(small_world.config, [f"run.folder={folder}"]))
    return folder


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def images_of(folder: Path) -> np.ndarray:
    with np.load(folder / "samples.npz") as archive:
        return archive["arr_0"]


def draw(config: str, *overrides: str) -> None:
    """Draws a sample set on this rank, and one of a single image, which most ranks cannot share."""
    sample(load_config(Path(config), overrides))
    *others, folder = overrides
    sample(load_config(Path(config), [*others, f"{folder}-one", "sample.num_samples=1"]))


@pytest.mark.slow
def test_images_do_not_depend_on_the_number_of_ranks(small_world, trained):
    sets = []
    for world_size in (1, 2):
        overrides = (f"run.folder={trained}", f"sample.folder={trained}/{world_size}")
        run_function(draw, world_size, small_world.config, *overrides)
        with np.load(trained / str(world_size) / "samples.npz") as archive:
            sets.append((archive["arr_0"], archive["arr_1"]))
    (images, labels), (other_images, other_labels) = sets
    assert images.shape == (64, 16, 16, 3)
    np.testing.assert_array_equal(images, other_images)
    np.testing.assert_array_equal(labels, other_labels)
    assert images.std() > 0
    singles = [images_of(trained / f"{world_size}-one") for world_size in (1, 2)]
    assert singles[0].shape == (1, 16, 16, 3)
    np.testing.assert_array_equal(*singles)


def described(folder, config, model):
    provenance = {"checkpoint": "none", "step": 5, "weights": "ema"}
    write_model(folder, model.state_dict(), config=to_tree(config), provenance=provenance)


def test_an_exported_model_with_a_class_token_is_sampled(small_world, tmp_path):
    overrides = ["sample.num_samples=3", "model.class_token_width=32", f"run.folder={tmp_path}"]
    config = load_config(small_world.config, [*overrides, "sample.cls_cfg_scale=2.0"])
    model = SiT(config.model, torch.Generator().manual_seed(0))
    described(tmp_path / "export", config, model)
    try:
        folder = sample(config)
    finally:
        ranks.close()
    with np.load(folder / "samples.npz") as archive:
        assert archive["arr_0"].shape == (3, 16, 16, 3)
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["sampler"]["cls_cfg_scale"] == 2.0


def test_guidance_of_a_class_token_that_is_not_there_is_refused(small_world, tmp_path):
    config = load_config(small_world.config, [f"run.folder={tmp_path}", "sample.cls_cfg_scale=2.0"])
    described(tmp_path / "export", config, SiT(config.model))
    try:
        with pytest.raises(ConfigError, match=r"sample\.cls_cfg_scale: .*has none; set 0"):
            sample(config)
    finally:
        ranks.close()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_model_is_sampled_where_its_training_files_are_not(small_world, tmp_path):
    config = load_config(small_world.config, ["sample.num_samples=3", f"run.folder={tmp_path}"])
    tree = to_tree(config)
    tree["engine"]["deepspeed"] = tree["data"]["folder"] = "gone"
    model = SiT(config.model, torch.Generator().manual_seed(0))
    provenance = {"checkpoint": "none", "step": 5, "weights": "ema"}
    write_model(tmp_path / "export", model.state_dict(), config=tree, provenance=provenance)
    try:
        folder = sample(config)
    finally:
        ranks.close()
    with np.load(folder / "samples.npz") as archive:
        assert archive["arr_0"].shape == (3, 16, 16, 3)


@pytest.fixture
def drawing(small_world, tmp_path):
    """Returns a function that samples an exported model in this process, with overrides."""

    def draw_here(*overrides: str, share: Share = EVERYTHING) -> Path:
        given = ["sample.num_steps=1", "sample.batch_size=4", f"run.folder={tmp_path}"]
        config = load_config(small_world.config, [*given, *overrides])
        if not (tmp_path / "export").exists():
            described(tmp_path / "export", config, SiT(config.model))
        try:
            return sample(config, share=share)
        finally:
            ranks.close()

    return draw_here


def test_the_classes_that_were_asked_for(drawing):
    counts = drawing("sample.labels.7=3", "sample.labels.2=4", "sample.num_samples=7")
    with np.load(counts / "samples.npz") as archive:
        assert archive["arr_1"].tolist() == [2, 2, 2, 2, 7, 7, 7]
    facts = json.loads((counts / "provenance.json").read_text())
    assert facts["sampler"]["labels"] == {"2": 4, "7": 3}
    in_turn = ("sample.labels=[3, 9]", "sample.num_samples=5", f"sample.folder={counts}-in-turn")
    with np.load(drawing(*in_turn) / "samples.npz") as archive:
        assert archive["arr_1"].tolist() == [3, 9, 3, 9, 3]
    with pytest.raises(OutputError, match=r"sampler\.labels\.1: 9 there, 8 now"):
        drawing("sample.labels=[3, 8]", *in_turn[1:])


def test_classes_that_the_model_does_not_have_are_refused(drawing, tmp_path):
    with pytest.raises(ConfigError, match=r"sample\.labels: 10, 12: .* has 10 classes, 0 to 9"):
        drawing("sample.labels=[3, 12, 10]")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (("objective",), "its config lacks 'objective'"),
        (("codec",), "its config lacks 'codec'"),
        (("objective", "interpolant", "path"), "interpolant.path: unknown path 'here'"),
    ],
)
def test_a_damaged_configuration_of_the_model_is_refused_before_anything_is_written(
    drawing, tmp_path, place, words
):
    drawing("sample.num_samples=2", f"sample.folder={tmp_path}/first")
    document = json.loads((tmp_path / "export" / "config.json").read_text())
    node = document["config"]
    for key in place[:-1]:
        node = node[key]
    if len(place) > 1:
        node[place[-1]] = "here"
    else:
        del node[place[-1]]
    (tmp_path / "export" / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=words):
        drawing("sample.num_samples=2", f"sample.folder={tmp_path}/second")
    assert not (tmp_path / "second").exists()


def test_a_set_that_another_process_assembles_is_left_to_it(drawing, tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "set"
    folder.mkdir()
    with files.locked(folder):
        drawing("sample.num_samples=2", f"sample.folder={folder}")
    assert "another process assembles it" in caplog.text
    assert files_in(folder) == [
        "contact_sheet.png", "parts", "parts/chunk-000000.safetensors", "provenance.json",
    ]  # fmt: skip
    drawing("sample.num_samples=2", f"sample.folder={folder}")
    assert files_in(folder) == ["contact_sheet.png", "provenance.json", "samples.npz"]


def test_the_folder_may_be_a_link_and_leftovers_of_kills_go(drawing, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "set").symlink_to("disk")
    for name in ("provenance.json.node-77.partial", "samples.npz.partial"):
        (tmp_path / "disk" / name).write_text("half")
        os.utime(tmp_path / "disk" / name, (1, 1))
    # What a living process may be writing on another machine stays.
    (tmp_path / "disk" / "samples.npz.node-77.partial").write_text("half")
    drawing("sample.num_samples=2", f"sample.folder={tmp_path}/set")
    assert (tmp_path / "set").is_symlink()
    names = sorted(path.name for path in (tmp_path / "disk").iterdir())
    beside = "samples.npz.node-77.partial"
    assert names == ["contact_sheet.png", "provenance.json", "samples.npz", beside]
    (tmp_path / "lost").symlink_to("unmounted")
    with pytest.raises(OutputError, match="lost is a link to unmounted, which does not exist"):
        drawing("sample.num_samples=2", f"sample.folder={tmp_path}/lost")


def test_outputs_at_once_and_one_that_is_added_later(drawing, tmp_path, caplog):
    given = ("sample.num_samples=11", f"sample.folder={tmp_path}/set")
    folder = drawing(*given, "sample.outputs=[shards]")
    assert files_in(folder)[:2] == ["contact_sheet.png", "provenance.json"]
    assert not (folder / "samples.npz").exists()
    before = (folder / "provenance.json").stat().st_mtime_ns
    caplog.set_level("INFO")
    drawing(*given, "sample.outputs=[npz, png]")
    assert "all images are already drawn" in caplog.text
    assert (folder / "provenance.json").stat().st_mtime_ns == before
    images = images_of(folder)
    stored = ShardDataset(folder / "shards").read(torch.arange(11)).pixels
    np.testing.assert_array_equal(stored.permute(0, 2, 3, 1).numpy(), images)
    with Image.open(folder / "png" / "000010.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), images[10])
    facts = drawing("sample.num_samples=11", f"sample.folder={tmp_path}/other")
    assert (facts / "provenance.json").read_text() == (folder / "provenance.json").read_text()


def test_shares_of_machines_without_a_common_folder(drawing, tmp_path, caplog):
    given = ("sample.num_samples=19",)
    whole = images_of(drawing(*given, f"sample.folder={tmp_path}/whole"))
    caplog.set_level("INFO")
    folders = [
        drawing(*given, f"sample.folder={tmp_path}/{number}", share=Share(number, 2))
        for number in range(2)
    ]
    assert "this share is drawn, 2 of 5 chunks of others are not" in caplog.text
    assert [len(list((folder / "parts").iterdir())) for folder in folders] == [3, 2]
    # A second time nothing is drawn, and the other share goes beside it.
    drawing(*given, f"sample.folder={tmp_path}/0", share=Share(0, 2))
    shutil.copytree(folders[1] / "parts", folders[0] / "parts", dirs_exist_ok=True)
    drawing(*given, f"sample.folder={tmp_path}/0", share=Share(1, 2))
    np.testing.assert_array_equal(images_of(folders[0]), whole)
    assert files_in(folders[0]) == ["contact_sheet.png", "provenance.json", "samples.npz"]


def test_a_damaged_part_is_drawn_again(drawing, tmp_path, caplog):
    given = ("sample.num_samples=19",)
    whole = images_of(drawing(*given, f"sample.folder={tmp_path}/whole"))
    folder = drawing(*given, f"sample.folder={tmp_path}/set", share=Share(0, 2))
    part = folder / "parts" / "chunk-000002.safetensors"
    part.write_bytes(part.read_bytes()[:-5])
    (folder / "parts" / "chunk-000001.claim").write_bytes(b"\xffgarbage")
    os.utime(folder / "parts" / "chunk-000001.claim", (1, 1))
    drawing(*given, f"sample.folder={tmp_path}/set")
    assert "damaged parts, which are drawn again: 1" in caplog.text
    np.testing.assert_array_equal(images_of(folder), whole)


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(
    drawing, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)
    given = ("sample.num_samples=100", f"sample.folder={tmp_path}/set")
    # Parts and an archive of 100 images of 16 x 16 x 3 bytes.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=153_000))
    with pytest.raises(OutputError, match=r"need about 154 KB, and 153 KB are free; choose"):
        drawing(*given)
    assert not (tmp_path / "set").exists()
    # A share needs room for its own parts.
    drawing(*given, share=Share(0, 25))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=154_000))
    drawing(*given)
    # A finished set needs none.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    drawing(*given)


def test_an_output_must_be_asked_for(small_world):
    with pytest.raises(ConfigError, match=r"sample\.outputs: .*at least 1"):
        load_config(small_world.config, ["sample.outputs=[]"])
