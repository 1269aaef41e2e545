"""`PretrainedSiT` on folders and on a stand-in of the Hub."""

import json

import pytest
import torch
from hub_stand_in import Repository, hub_stand_in

from srepa_ds.errors import CheckpointError, DataError, OutputError
from srepa_ds.weights.exported import read_model
from srepa_ds.weights.hub import PretrainedSiT

NAME = "someone/model"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the Hub that takes the token `hf_write`."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with hub_stand_in() as stand_in:
        stand_in.writers.add("hf_write")
        monkeypatch.setenv("HF_ENDPOINT", stand_in.address)
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.address)
        resolve = stand_in.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield stand_in


@pytest.fixture
def exported(small_run):
    """A run whose exported model lies on disk."""
    made = small_run()
    made.write_export()
    return made


def same(one, other) -> bool:
    found, expected = one.state_dict(), other.state_dict()
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], value) for name, value in expected.items()
    )


def test_an_exported_folder_is_read_and_written_again(exported, tmp_path):
    expected = read_model(exported.config.export_folder)
    model = PretrainedSiT.from_pretrained(exported.config.export_folder)
    assert same(model, expected.model)
    assert not model.training
    inputs = torch.randn(2, *model.latent_shape), torch.rand(2), torch.tensor([3, 4])
    assert torch.equal(model(*inputs).velocity, expected.model(*inputs).velocity)
    model.save_pretrained(tmp_path / "copy")
    again = read_model(tmp_path / "copy")
    assert same(again.model, expected.model)
    assert again.config == expected.config
    assert again.provenance == {**expected.provenance, "dtype": "fp32"}
    assert "library_name: srepa_ds" in (tmp_path / "copy/README.md").read_text()
    (tmp_path / "copy/README.md").write_text("mine")
    model.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy/README.md").read_text() == "mine"


def test_a_folder_of_other_files_is_left_alone(exported, tmp_path):
    model = PretrainedSiT.from_pretrained(exported.config.export_folder)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(OutputError, match="holds files other than an exported model"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "bert"}'


def test_a_model_travels_over_the_hub(hub, exported, tmp_path):
    model = PretrainedSiT.from_pretrained(exported.config.export_folder)
    address = model.push_to_hub(NAME, private=True)
    repository = hub.repositories[NAME]
    assert address == f"{hub.address}/{NAME}/commit/{repository.commit}"
    assert repository.private
    assert repository.messages == ["step 5"]
    found = PretrainedSiT.from_pretrained(NAME, cache_dir=tmp_path / "cache")
    assert same(found, model)
    assert found.document.provenance == {**model.document.provenance, "dtype": "fp32"}
    revision = repository.commit
    assert same(
        PretrainedSiT.from_pretrained(NAME, revision=revision, cache_dir=tmp_path / "c2"), model
    )
    assert not hub.gets(".py") + hub.gets("README.md")
    with pytest.raises(DataError, match="no revision 'v9'"):
        PretrainedSiT.from_pretrained(NAME, revision="v9", cache_dir=tmp_path / "cache")


def test_a_download_of_other_bytes_is_named(hub, exported, tmp_path):
    PretrainedSiT.from_pretrained(exported.config.export_folder).push_to_hub(NAME)
    hub.damaged.add("model.safetensors")
    with pytest.raises(CheckpointError, match=r"someone/model: .*has changed since.*force_downl"):
        PretrainedSiT.from_pretrained(NAME, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("fault", "words"),
    [("GatedRepo", "its owner grants access"), ("RepoNotFound", "no such repository")],
)
def test_a_hub_that_refuses_is_one_error(hub, tmp_path, fault, words):
    hub.repositories[NAME] = Repository({}, fault=fault)
    with pytest.raises(DataError, match=words):
        PretrainedSiT.from_pretrained(NAME, cache_dir=tmp_path / "cache")


def test_another_model_is_not_overwritten(hub, exported):
    model = PretrainedSiT.from_pretrained(exported.config.export_folder)
    model.push_to_hub(NAME)
    document = json.loads(hub.repositories[NAME].files["config.json"])
    document["config"]["run"]["folder"] = "/elsewhere/other"
    hub.repositories[NAME].files["config.json"] = json.dumps(document).encode()
    with pytest.raises(
        OutputError,
        match=r"a model of the run /elsewhere/other \[.*, and this is one of the run .*/run \[",
    ):
        model.push_to_hub(NAME)
    hub.repositories[NAME].files |= {"README.md": b"of an export", "samples.png": b"picture"}
    model.push_to_hub(NAME, replace=True)
    assert hub.repositories[NAME].files["README.md"] == b"of an export"
    assert hub.repositories[NAME].files["samples.png"] == b"picture"
    assert json.loads(hub.repositories[NAME].files["config.json"]) != document
    assert hub.repositories[NAME].messages == ["step 5"] * 2
