"""Sampling as users run it: the same images for any number of ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_function
from trainings import train_runs

from srepa_ds.commands.export import export
from srepa_ds.commands.sample import sample
from srepa_ds.config.experiment import load_config
from srepa_ds.distributed import ranks
from srepa_ds.errors import ConfigError
from srepa_ds.model.sit import SiT
from srepa_ds.schema import to_tree
from srepa_ds.weights.exported import write_model


@pytest.fixture(scope="module")
def trained(small_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run_function(train_runs, 1, [small_world.config, f"run.folder={folder}", "train.steps=5"])
    export(load_config(small_world.config, [f"run.folder={folder}"]))
    return folder


def draw(config: str, *overrides: str) -> None:
    """Draws a sample set on this rank."""
    sample(load_config(Path(config), overrides))


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
