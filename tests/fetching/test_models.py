"""Which files are fetched of a diffusion model's repository, and where settings find them."""

import json
import os
from pathlib import Path

import pytest
import torch
from builders import contents, objective_of
from hub_stand_in import Repository, hub_stand_in
from safetensors.torch import save

from srepa_ds.cli import run
from srepa_ds.commands.fetch import named_weights
from srepa_ds.config.experiment import load_config
from srepa_ds.encoders.publications import PUBLISHED, HubModel
from srepa_ds.encoders.published import local_model, path_of_model
from srepa_ds.errors import DataError
from srepa_ds.weights.initial import InitialWeightsConfig, initialise_from

NAME = "someone/model"
WEIGHTS = save({"x": torch.arange(4)})
OTHERS = {"model.py": b"raise SystemExit", "pytorch_model.bin": b"a pickle", "README.md": b"text"}
OWN = {"config.json": b"{}", "model.safetensors": WEIGHTS}
DIFFUSERS = {
    "model_index.json": b"{}",
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors": WEIGHTS,
    "scheduler/scheduler_config.json": b"{}",
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.safetensors": WEIGHTS,
}
SHARDS = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS,
    "model.safetensors.index.json": b"{}",
}
HOSTILE = {
    "transformer/transformer_sit.py": b"raise SystemExit",
    "../outside.safetensors": WEIGHTS,
    "model-00001-of-00002.safetensors.exe": b"x",
    "transformer/deeper/config.json": b"{}",
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in, the only Hub there is; commands run in an empty folder."""
    constants = pytest.importorskip("huggingface_hub.constants")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with hub_stand_in() as stand_in:
        monkeypatch.setenv("HF_ENDPOINT", stand_in.address)
        monkeypatch.setenv("SREPA_FETCHED", str(tmp_path / "fetched"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield stand_in


@pytest.fixture
def fetch(hub, small_world):
    """Returns a function that fetches for an experiment with these settings."""

    def fetched(*overrides: str) -> int:
        own = ("alignments=[]", "evaluate=null", *overrides)
        return run(["fetch", str(small_world.config), *own])

    return fetched


@pytest.mark.parametrize(
    ("files", "more"),
    [(OWN, {}), (DIFFUSERS, {}), (SHARDS, {}), ({**DIFFUSERS, **OWN}, {}), (OWN, HOSTILE)],
)
def test_the_files_of_a_model_and_no_others(hub, fetch, tmp_path, files, more):
    hub.repositories[NAME] = Repository({**files, **OTHERS, **more})
    assert fetch(f"sample.weights={NAME}") == 0
    expected = OWN if "model.safetensors" in files else files
    found = contents(tmp_path / "fetched/someone--model")
    assert {name: value for name, value in found.items() if value is not None} == expected
    assert not [name for name in (*OTHERS, *HOSTILE) if hub.gets(f"/{name}")]
    assert local_model_of(NAME) == tmp_path / "fetched/someone--model"
    assert not (tmp_path / "outside.safetensors").exists()


def local_model_of(name: str) -> Path:
    return local_model(Path(name), setting="sample.weights")


def test_what_an_earlier_fetch_left_does_not_come_in(hub, fetch, tmp_path):
    left = tmp_path / "fetched/someone--model.partial"
    for name in ("transformer/old.safetensors", "other/old.json", "transformer/deep/er/old.json"):
        (left / name).parent.mkdir(parents=True, exist_ok=True)
        (left / name).write_bytes(b"old")
    hub.repositories[NAME] = Repository(dict(DIFFUSERS))
    assert fetch(f"sample.weights={NAME}") == 0
    found = contents(tmp_path / "fetched/someone--model")
    folders = {"transformer": None, "scheduler": None, "vae": None}
    assert found == {**DIFFUSERS, **folders}


def test_a_single_file_is_found_as_a_file(hub, fetch, tmp_path):
    hub.repositories[NAME] = Repository({"sit-b2.safetensors": WEIGHTS, **OTHERS})
    assert fetch(f"train.init_from.path={NAME}@main") == 0
    place = tmp_path / "fetched/someone--model@main/sit-b2.safetensors"
    assert local_model_of(f"{NAME}@main") == place
    place.write_bytes(place.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"sit-b2.safetensors: has .* bytes, and .* were fetched"):
        local_model_of(f"{NAME}@main")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (OTHERS, "only pytorch_model.bin, a pickle"),
        ({"README.md": b""}, "neither an exported model"),
        ({"a.safetensors": WEIGHTS, "b.safetensors": WEIGHTS}, "nor one file of safetensors"),
        ({"transformer/config.json": b"{}"}, "neither an exported model"),
    ],
)
def test_repositories_without_a_model(hub, fetch, tmp_path, capsys, files, words):
    hub.repositories[NAME] = Repository(dict(files))
    assert fetch(f"sample.guide={NAME}") == 2
    message = "".join(capsys.readouterr())
    assert message.count("error:") == 1
    assert words in message
    assert not (tmp_path / "fetched").exists()


def test_every_setting_of_a_model_is_found(hub, small_world):
    settings = ("sample.weights", "sample.guide", "train.init_from.path")
    given = [f"{name}=someone/model{number}" for number, name in enumerate(settings)]
    config = load_config(small_world.config, ["alignments=[]", "evaluate=null", *given])
    found = {named.setting: named.published for named in named_weights(config)}
    assert found == {
        name: HubModel(f"someone/model{number}") for number, name in enumerate(settings)
    }


@pytest.mark.parametrize("path", ["here/run", "/abs/run", "a/b/c", "someone/0400000.pt", "run"])
def test_paths_are_no_repositories(hub, small_world, path):
    os.mkdir("here")
    config = load_config(
        small_world.config, ["alignments=[]", "evaluate=null", f"sample.weights={path}"]
    )
    assert list(named_weights(config)) == []


def test_a_folder_that_exists_comes_before_a_fetched_one(hub, fetch, tmp_path):
    hub.repositories[NAME] = Repository(dict(OWN))
    assert fetch(f"sample.weights={NAME}") == 0
    os.makedirs(NAME)
    assert str(local_model_of(NAME)) == NAME


def test_what_was_not_fetched_is_one_message(hub, small_world, capsys):
    named = f"sample.weights={NAME}"
    assert run(["sample", str(small_world.config), named]) == 2
    message = "".join(capsys.readouterr())
    assert message.count("error:") == 1
    assert f"sample.weights: {NAME}: no such file or folder (looked for at" in message
    assert "run `srepa-ds fetch CONFIG` where there is a network" in message
    objective = objective_of(load_config(small_world.config))
    with pytest.raises(DataError, match=r"train.init_from.path: someone/model: no such file"):
        initialise_from(objective, InitialWeightsConfig(path=Path(NAME)))
    assert hub.requests == []


def test_the_folders_of_the_first_format_are_still_read(hub, fetch, tmp_path):
    """`fetched.json` of version 1, which an earlier release wrote."""
    hub.repositories[NAME] = Repository(dict(OWN))
    assert fetch(f"sample.weights={NAME}") == 0
    path = tmp_path / "fetched/fetched.json"
    document = json.loads(path.read_text())
    assert document["version"] == 2
    path.write_text(json.dumps({**document, "version": 1}))
    assert path_of_model(Path(NAME)) == tmp_path / "fetched/someone--model"
    asked = len(hub.requests)
    assert fetch(f"sample.weights={NAME}") == 0
    assert len(hub.requests) == asked


def test_a_name_of_a_repository():
    assert PUBLISHED["sit"]("a/b@v1") == HubModel("a/b", revision="v1")
    for name in ("a", "a/b/c", "a/b.safetensors", "/a/b", "../b"):
        with pytest.raises(DataError, match="not the name of a repository"):
            PUBLISHED["sit"](name)
