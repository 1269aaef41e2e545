"""The VAE whose decoder draws, and what is noted beside a set."""

import json
import logging

import numpy as np
import pytest
import torch
from builders import randomised
from drawn_sets import drawn, facts, images
from small_vae import write_vae

from srepa_ds.config.experiment import Config, load_config
from srepa_ds.drawing import compiled
from srepa_ds.drawing.compiled import check_compiler
from srepa_ds.errors import ConfigError, DataError
from srepa_ds.model.sit import SiT
from srepa_ds.schema import to_tree
from srepa_ds.telemetry.environment import device_name
from srepa_ds.weights.exported import write_model

OWN_DEVICE = device_name(torch.device("cpu"))
LATENTS = ("alignments=[]", "codec.kind=vae", "model.in_channels=4", "model.input_size=4")
QUICK = ("sample.num_steps=1", "sample.batch_size=4", "sample.num_samples=6")


@pytest.fixture
def configured(small_world, tmp_path):
    """Returns a function that loads an experiment on latents of `sd-vae-ft-mse`, and exports it."""
    mse = write_vae(tmp_path / "sd-vae-ft-mse")
    write_vae(tmp_path / "sd-vae-ft-ema", decoder_seed=1)
    own = (f"run.folder={tmp_path}/run", f"codec.weights={mse}", *LATENTS, *QUICK)

    def load(*overrides: str) -> Config:
        return load_config(small_world.config, (*own, *overrides))

    config = load()
    model = randomised(SiT(config.model))
    provenance = {"checkpoint": "none", "step": 5, "weights": "ema"}
    write_model(
        config.export_folder, model.state_dict(), config=to_tree(config), provenance=provenance
    )
    return load


def test_the_named_decoder_draws_and_its_name_is_noted(configured, tmp_path):
    trained_with = drawn(configured(f"sample.folder={tmp_path}/mse", "sample.preset=unguided"))
    ema = f"sample.decoder={tmp_path}/sd-vae-ft-ema"
    named = drawn(configured(f"sample.folder={tmp_path}/ema", "sample.preset=unguided", ema))
    assert not np.array_equal(images(named), images(trained_with))
    codec = configured(f"sample.folder={tmp_path}/c", f"codec.weights={tmp_path}/sd-vae-ft-ema")
    np.testing.assert_array_equal(images(named), images(drawn(codec)))
    assert facts(named)["decoder"] == "sd-vae-ft-ema"
    assert "decoder" not in facts(named)["deviations"]
    assert facts(trained_with)["deviations"]["decoder"] == {
        "preset": "stabilityai/sd-vae-ft-ema",
        "here": "sd-vae-ft-mse",
    }
    assert facts(named)["devices"] == [OWN_DEVICE]


def test_a_decoder_that_is_missing_or_of_other_latents_is_refused(configured, tmp_path):
    with pytest.raises(DataError, match=r"sample\.decoder: some/vae is not a folder.*not fetched"):
        drawn(configured("sample.decoder=some/vae"))
    with pytest.raises(ConfigError, match=r"sample\.decoder: decodes latents of a VAE"):
        drawn(configured(*_in_pixels(configured, tmp_path), "sample.decoder=some/vae"))


def _in_pixels(configured, tmp_path) -> tuple[str, ...]:
    overrides = ("codec.kind=identity", "codec.weights=null", f"export.folder={tmp_path}/pixels")
    config = configured(*overrides)
    model, provenance = SiT(config.model), {"checkpoint": "none", "step": 5, "weights": "ema"}
    write_model(
        config.export_folder, model.state_dict(), config=to_tree(config), provenance=provenance
    )
    return (*overrides, f"sample.weights={config.export_folder}")


def test_deviations_are_said_and_notes_of_a_finished_set_renewed(configured, tmp_path, caplog):
    folder = f"sample.folder={tmp_path}/set"
    with caplog.at_level(logging.INFO, "srepa_ds"):
        drawn(configured(folder, "sample.cfg_scale=1.5"))
        assert "deviates" not in caplog.text
        drawn(configured(folder, "sample.cfg_scale=1.5", "sample.preset=irepa"))
    found = "num_steps 1, not 250; cfg_scale 1.5, not 1.0; num_samples 6, not 50000"
    assert "deviates from irepa: " in caplog.text
    assert all(part in caplog.text for part in found.split("; "))
    assert facts(tmp_path / "set")["preset"] == "irepa"


def test_a_set_that_another_device_began_is_warned_of(configured, tmp_path, caplog):
    config = configured(f"sample.folder={tmp_path}/set")
    folder = drawn(config)
    notes = {**facts(folder), "devices": ["cuda Some GPU"]}
    (folder / "provenance.json").write_text(json.dumps(notes))
    drawn(config)
    assert "several kinds of devices" not in caplog.text
    assert facts(folder)["devices"] == ["cuda Some GPU"]
    (folder / "samples.npz").unlink()
    drawn(config)
    assert f"several kinds of devices ({OWN_DEVICE}, cuda Some GPU)" in caplog.text
    assert facts(folder)["devices"] == sorted([OWN_DEVICE, "cuda Some GPU"])


def test_compiled_models_need_a_compiler(configured, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    words = r"sample\.compile: torch\.compile cannot work here: CXX names no program.*to false"
    with pytest.raises(ConfigError, match=words):
        drawn(configured("sample.compile=true"))
    check_compiler(False, torch.device("cpu"))
    monkeypatch.setattr(compiled, "missing_compiler", lambda device: None)
    check_compiler(True, torch.device("cpu"))
