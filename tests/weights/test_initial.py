"""Initial weights from another training, in every form they come in."""

import argparse
import json
import logging
import os
from collections import OrderedDict
from pathlib import Path

import original_sit
import pytest
import torch
from builders import objective_of, randomised
from safetensors.torch import save_file
from torch import Tensor

from srepa_ds.config.experiment import Config, load_config
from srepa_ds.errors import CheckpointError
from srepa_ds.model.embeddings import position_embedding
from srepa_ds.objective import Objective
from srepa_ds.schema import to_tree
from srepa_ds.weights.exported import write_model
from srepa_ds.weights.initial import (
    InitialWeightsConfig,
    fill,
    initialise_from,
    read_initial_weights,
)


@pytest.fixture
def config(small_world) -> Config:
    return load_config(small_world.config)


def objective(config: Config, seed: int = 0, *, width: int = 32) -> Objective:
    """Draws all weights at random, including those that start at zero in a run."""
    return randomised(objective_of(config, teacher_width=width), seed=seed, scale=1.0)


def official(module: Objective) -> dict[str, Tensor]:
    """The state_dict of REPA's model: in its order, with the position table."""
    state = {name.removeprefix("sit."): value for name, value in module.state_dict().items()}
    front = ("pos_embed", "x_embedder", "t_embedder", "y_embedder", "blocks", "projectors", "final")
    return {name: state[name].clone() for part in front for name in state if name.startswith(part)}


def assert_same(module: Objective, state: dict[str, Tensor], *, but: str = "nothing") -> None:
    for name, weight in official(module).items():
        if not name.startswith(("pos_embed", but)):
            assert torch.equal(weight, state[name]), name


def repa_file(path: Path, model: Objective, ema: Objective) -> None:
    """A checkpoint of REPA's trainer: model, average, optimizer, and its pickled settings."""
    parameters = [torch.nn.Parameter(value) for value in official(model).values()]
    optimizer = torch.optim.AdamW(parameters)
    torch.stack([p.sum() for p in parameters[1:]]).sum().backward()
    optimizer.step()
    args = argparse.Namespace(model="SiT-XL/2", enc_type="dinov2-vit-b", proj_coeff=0.5, lr=1e-4)
    torch.save(
        {
            "model": official(model),
            "ema": OrderedDict(official(ema)),
            "opt": optimizer.state_dict(),
            "args": args,
            "steps": 400_000,
        },
        path,
    )


@pytest.mark.parametrize(("which", "seed"), [("model", 1), ("ema", 2)])
def test_a_file_of_repas_trainer(config, tmp_path, caplog, which, seed):
    path = tmp_path / "0400000.pt"
    repa_file(path, objective(config, 1), objective(config, 2))
    module = objective(config)
    with caplog.at_level(logging.INFO, logger="srepa_ds"):
        report = initialise_from(module, InitialWeightsConfig(path=path, weights=which))
    assert_same(module, official(objective(config, seed)))
    assert len(report.loaded) == len(list(module.parameters()))
    assert (report.initialised, report.unused) == ((), ())
    assert f"initialised {len(report.loaded)} weights from {path}" in caplog.text
    assert all(weight.dtype == torch.float32 for weight in module.parameters())


def renamed(state: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): value for name, value in state.items()}


def legacy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Aligned after two blocks, with the third numbered from zero."""
    return renamed(state, "blocks.2.", "decoder_blocks.0.")


FORMS = {
    "bare": lambda state: state,
    "legacy": legacy,
    "data parallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "both": lambda state: {f"module._orig_mod.{k}": value for k, value in legacy(state).items()},
    "other way round": lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
    "another module": lambda state: {f"net.{name}": value for name, value in state.items()},
    "several": lambda state: {f"module.model.net.{k}": v for k, v in state.items()},
    "compiled blocks": lambda state: renamed(state, "blocks.1.", "blocks.1._orig_mod."),
    "iREPA's MLP": lambda state: renamed(state, "projectors.0.", "projectors.0.projection_layer."),
    "no position table": lambda state: {k: v for k, v in state.items() if k != "pos_embed"},
}


@pytest.mark.parametrize("ending", ["pt", "safetensors", "old.pt"])
@pytest.mark.parametrize("form", FORMS)
def test_a_bare_state_in_every_form(config, tmp_path, form, ending):
    given = official(objective(config, 1))
    path = tmp_path / f"last.{ending}"
    state = {name: value.contiguous() for name, value in FORMS[form](given).items()}
    if ending == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=ending == "pt")
    tensors = read_initial_weights(path, which="ema")
    assert tensors.keys() == given.keys() - {"pos_embed"}
    module = objective(config)
    fill(module, tensors)
    assert_same(module, given)


NESTED = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "state_dict of a training": lambda state: {"state_dict": {"ema": state, "model": {}}},
    "training with wrapped kinds": lambda state: {
        "ema": {"module": state},
        "model": {"module": {}},
    },
    "kinds below kinds": lambda state: {"ema": {"model": {"state_dict": state}}, "steps": 3},
}


@pytest.mark.parametrize("nested", NESTED)
def test_a_state_however_deep(config, tmp_path, nested):
    given = official(objective(config, 1))
    torch.save(NESTED[nested](given), tmp_path / "weights.pt")
    tensors = read_initial_weights(tmp_path / "weights.pt", which="ema")
    assert tensors.keys() == given.keys() - {"pos_embed"}


def test_a_mapping_that_holds_itself_is_no_state(config, tmp_path):
    circle: dict = {"state_dict": None, "steps": 3}
    circle["state_dict"] = circle
    torch.save(circle, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="does not hold a state_dict: state_dict, steps are"):
        read_initial_weights(tmp_path / "weights.pt", which="ema")


def exported(folder: Path, config: Config, *, weights: str = "ema", **model) -> dict[str, Tensor]:
    state = official(objective(config, 1))
    tree = to_tree(config)
    tree["model"] |= model
    write_model(folder, state, config=tree, provenance={"weights": weights, "step": 5})
    return state


@pytest.mark.parametrize(
    ("label", "which"), [("ema", "ema"), ("ema-0.9", "ema"), ("master", "model")]
)
def test_an_exported_model(config, tmp_path, label, which):
    state = exported(tmp_path / "export", config, weights=label)
    module = objective(config)
    initialise_from(module, InitialWeightsConfig(path=tmp_path / "export", weights=which))
    assert_same(module, state)
    other = "model" if which == "ema" else "ema"
    with pytest.raises(CheckpointError, match=f"holds the weights '{label}'; set .* to {which}"):
        read_initial_weights(tmp_path / "export", which=other)


def test_another_number_of_heads_is_another_model(config, tmp_path):
    exported(tmp_path / "export", config, num_heads=6)
    before = official(module := objective(config))
    with pytest.raises(CheckpointError, match="6 attention heads, this one has 3"):
        initialise_from(module, InitialWeightsConfig(path=tmp_path / "export"))
    assert_same(module, before)


def test_from_one_resolution_to_a_larger(config, small_world, tmp_path):
    state = exported(tmp_path / "export", config)
    larger = load_config(small_world.config, ["model.input_size=32"])
    module = objective(larger)
    initialise_from(module, InitialWeightsConfig(path=tmp_path / "export"))
    assert_same(module, state)
    expected = position_embedding((16, 16), 48)
    assert module.sit.pos_embed.shape == (1, 256, 48) != state["pos_embed"].shape
    assert torch.equal(module.sit.pos_embed, expected)


def test_projectors_that_fit_and_those_that_do_not(config, tmp_path, caplog):
    state = exported(tmp_path / "export", config)
    module = objective(config, 3, width=20)
    before = official(module)
    with caplog.at_level(logging.INFO, logger="srepa_ds"):
        report = initialise_from(module, InitialWeightsConfig(path=tmp_path / "export"))
    # Two of its three layers would fit, but they belong to another teacher's.
    assert_same(module, state, but="projectors")
    assert_same(module, {**state, **{k: v for k, v in before.items() if "projectors" in k}})
    assert set(report.initialised) == set(report.unused)
    assert len(report.unused) == 6
    assert "initialised at random: projectors.0.0.weight" in caplog.text
    assert "and 1 more; the file's" in caplog.text


def test_a_file_without_projectors(config):
    given = {k: v for k, v in official(objective(config, 1)).items() if "projectors" not in k}
    given.pop("pos_embed")
    module = objective(config)
    before = official(module)
    report = fill(module, given)
    assert_same(module, {**before, **given})
    assert len(report.initialised) == 6
    assert report.unused == ()


def test_a_model_without_projectors(config, small_world, caplog, tmp_path):
    exported(tmp_path / "export", config)
    plain = load_config(small_world.config, ["alignments=[]"])
    module = Objective(plain.model, plain.objective)
    with caplog.at_level(logging.INFO, logger="srepa_ds"):
        report = initialise_from(module, InitialWeightsConfig(path=tmp_path / "export"))
    assert len(report.unused) == 6
    assert "not used: projectors.0.0.bias" in caplog.text


def test_what_does_not_fit_is_named_and_nothing_is_changed(config, small_world, tmp_path):
    state = exported(tmp_path / "export", config)
    changes = ["model.num_classes=12", "model.depth=4"]
    module = objective(load_config(small_world.config, changes))
    before = official(module)
    with pytest.raises(CheckpointError) as caught:
        initialise_from(module, InitialWeightsConfig(path=tmp_path / "export"))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/export does not fit the model: ")
    table = "y_embedder.embedding_table.weight: (11, 48) in the file, (13, 48) in the model; "
    assert table in message
    assert "blocks.3.attn.qkv.weight: none in the file, (144, 48) in the model" in message
    # The table and ten of the fourth block.
    assert "and 6 more; set the section `model` to the one these" in message
    assert_same(module, before)
    state["blocks.9.extra"] = torch.zeros(2)
    with pytest.raises(
        CheckpointError, match=r"blocks.9.extra: \(2,\) in the file, none in the model"
    ):
        fill(objective(config), state)


class Malicious:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_does_not_run(config, tmp_path, zipped):
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    content = {"ema": official(objective(config)), "args": Malicious(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"Python objects \(\w+.mkdir\), which are never"):
        read_initial_weights(path, which="ema")
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()


FAULTS = {
    "no such file": (lambda path, state: None, "no such file; correct train.init_from.path"),
    "torn": (
        lambda path, state: (torch.save(state, path), os.truncate(path, 5000)),
        "cannot be read: ",
    ),
    "empty": (lambda path, state: path.write_bytes(b""), "cannot be read: "),
    "text": (lambda path, state: path.write_text("weights"), "cannot be read: "),
    "a list": (lambda path, state: torch.save([1, 2], path), "holds a list, not a state_dict"),
    "no state": (
        lambda path, state: torch.save({}, path),
        "does not hold a state_dict: it is empty",
    ),
    "no tensors": (
        lambda path, state: torch.save({**state, "lr": 1e-4}, path),
        "does not hold a state_dict: lr are not tensors",
    ),
    "no average": (
        lambda path, state: torch.save({"model": state, "steps": 1}, path),
        "does not hold 'ema', but model, steps; set train.init_from.weights",
    ),
    "diverged": (
        lambda path, state: torch.save(
            {**state, "x_embedder.proj.bias": torch.full((48,), torch.nan)}, path
        ),
        "not finite: x_embedder.proj.bias",
    ),
    "a checkpoint": (lambda path, state: path.mkdir(), "make one with `srepa-ds export CONFIG`"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_one_message(config, tmp_path, fault):
    make, words = FAULTS[fault]
    path = tmp_path / "weights.pt"
    make(path, official(objective(config)))
    with pytest.raises(CheckpointError, match=words) as caught:
        read_initial_weights(path, which="ema")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "has changed since it was exported"),
        ({"sha256": None}, "'sha256' is not text"),
        ({"provenance": {}}, "it lacks 'weights'"),
        ({"provenance": {"weights": 3, "step": 5}}, "'weights' is not text"),
        ({"provenance": {"weights": "ema", "step": True}}, "'step' is not a whole number"),
        ({"config": []}, "'config' is not an object"),
    ],
)
def test_a_damaged_exported_model(config, tmp_path, changes, words):
    exported(tmp_path / "export", config)
    os.truncate(tmp_path / "export" / "model.safetensors", 5000)
    document = tmp_path / "export" / "config.json"
    document.write_text(json.dumps(json.loads(document.read_text()) | changes))
    with pytest.raises(CheckpointError, match=words):
        initialise_from(objective(config), InitialWeightsConfig(path=tmp_path / "export"))


def test_an_export_without_a_hash_is_torn_or_of_another_model(config, tmp_path):
    exported(tmp_path / "export", config)
    path = tmp_path / "export" / "config.json"
    document = json.loads(path.read_text())
    del document["sha256"]
    del document["config"]["model"]
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="its config lacks 'model'"):
        initialise_from(objective(config), InitialWeightsConfig(path=tmp_path / "export"))
    os.truncate(tmp_path / "export" / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read: "):
        read_initial_weights(tmp_path / "export", which="ema")


@pytest.mark.parametrize("form", ["file", "folder"])
def test_the_original_sit_in_repas_convention(small_world, tmp_path, caplog, form):
    own = original_sit.sizes()
    changes = [f"model.{name}={value}" for name, value in own.shape._asdict().items()]
    changes += [f"model.{name}={getattr(own, name)}" for name in ("input_size", "num_classes")]
    plain = load_config(small_world.config, [*changes, "model.in_channels=4", "alignments=[]"])
    path = tmp_path / "sit"
    if form == "file":
        torch.save(original_sit.ORIGINAL, path)
    else:
        original_sit.write_pipeline(path)
    module = objective_of(plain)
    with caplog.at_level(logging.INFO, logger="srepa_ds"):
        initialise_from(module, InitialWeightsConfig(path=path))
    original_sit.assert_golden(module.sit.state_dict())
    assert f"{path}: time is reversed, exactly" in caplog.text


def test_the_heads_of_a_transformer_of_diffusers_must_be_the_models(config, tmp_path):
    original_sit.write_pipeline(tmp_path / "sit", num_heads=16)
    with pytest.raises(CheckpointError, match="16 attention heads, this one has 3"):
        initialise_from(objective(config), InitialWeightsConfig(path=tmp_path / "sit"))
