"""Sets drawn from files of weights that do not describe their model."""

import numpy as np
import original_sit
import pytest
import torch
from drawn_sets import drawn, facts, images, official, write_repa
from safetensors.torch import save_file

from srepa_ds.drawing.model import open_models
from srepa_ds.errors import CheckpointError, ConfigError, OutputError
from srepa_ds.files import sha256_of


@pytest.mark.parametrize(("weights", "seed"), [("ema", 2), ("master", 1)])
def test_a_checkpoint_of_repa_is_drawn_from(configured, tmp_path, weights, seed):
    config = configured(f"sample.weights={tmp_path}/0400000.pt", f"export.weights={weights}")
    write_repa(tmp_path / "0400000.pt", config)
    save_file(official(config, seed), tmp_path / "plain.safetensors")
    folder = drawn(config)
    assert folder == config.run.folder / "samples"
    found = facts(folder)
    assert found["checkpoint_sha256"] == sha256_of(tmp_path / "0400000.pt")
    assert found["ema"] == weights
    plain = configured(
        f"sample.weights={tmp_path}/plain.safetensors", f"sample.folder={tmp_path}/plain"
    )
    np.testing.assert_array_equal(images(drawn(plain)), images(folder))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model.hidden_size=24",), r"does not fit the model: .*; set the section `model`"),
        (
            ("model.depth=2",),
            r"the model has no blocks\.2\.[^\n]* and \d+ more; set the section `model`[^\n]*$",
        ),
        (("export.weights=ema-0.99",), r"export\.weights: 'ema-0\.99': .* ema or master"),
        (("export.power_sigma=0.1",), r"export\.power_sigma: is made of a run's checkpoints"),
    ],
)
def test_files_of_another_model_or_kind_are_refused(configured, tmp_path, overrides, words):
    write_repa(tmp_path / "repa.pt", configured())
    with pytest.raises((CheckpointError, ConfigError), match=words):
        drawn(configured(f"sample.weights={tmp_path}/repa.pt", *overrides))


def test_a_file_without_the_wanted_kind_names_the_setting(configured, tmp_path):
    torch.save({"model": official(configured(), 1), "opt": {}}, tmp_path / "no-ema.pt")
    with pytest.raises(CheckpointError, match=r"does not hold 'ema'.*set export\.weights"):
        drawn(configured(f"sample.weights={tmp_path}/no-ema.pt"))


def test_the_heads_of_a_model_that_its_file_does_not_describe_are_a_fact(configured, tmp_path):
    save_file(official(configured(), 1), tmp_path / "plain.safetensors")
    own = (f"sample.weights={tmp_path}/plain.safetensors", f"sample.folder={tmp_path}/set")
    sizes = facts(drawn(configured(*own)))["model"]
    assert (sizes["num_heads"], sizes["depth"]) == (3, 3)
    with pytest.raises(OutputError, match=r"model\.num_heads: 3 there, 6 now"):
        drawn(configured(*own, "model.num_heads=6"))


def of_golden_sizes(configured, *overrides: str):
    own = original_sit.sizes()
    sizes = {**own.shape._asdict(), "input_size": own.input_size, "num_classes": own.num_classes}
    changes = [f"model.{name}={value}" for name, value in sizes.items()]
    return configured(*changes, "model.in_channels=4", "alignments=[]", *overrides)


@pytest.mark.parametrize("form", ["file", "folder"])
def test_the_original_sit_is_read_in_repas_convention(configured, tmp_path, form):
    path = tmp_path / "sit"
    if form == "file":
        save_file(original_sit.ORIGINAL, path)
    else:
        original_sit.write_pipeline(path)
    config = of_golden_sizes(configured, f"sample.weights={path}", f"sample.guide={path}")
    models = open_models(config)
    assert models.guide is not None
    for found in (models.model, models.guide):
        original_sit.assert_golden(found.model.state_dict())
        assert found.document.provenance["checkpoint"] == "sit"


def test_the_heads_of_a_transformer_of_diffusers_must_be_the_models(configured, tmp_path):
    original_sit.write_pipeline(tmp_path / "sit", num_heads=16)
    config = of_golden_sizes(configured, f"sample.weights={tmp_path}/sit")
    with pytest.raises(CheckpointError, match="has 16 attention heads, not 4; set the section"):
        open_models(config)
