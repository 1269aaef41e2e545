"""Folders of SiT as diffusers saves it, and shards with an index."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from original_sit import (
    ORIGINAL,
    assert_golden,
    transformer_config,
    without_sigma,
    write_pipeline,
    write_shards,
)
from safetensors.torch import load_file, save_file

from srepa_ds import weight_file
from srepa_ds.errors import CheckpointError
from srepa_ds.files import sha256_of
from srepa_ds.weights.exported import write_model
from srepa_ds.weights.foreign.folders import is_foreign_folder, sha256_of_weights
from srepa_ds.weights.foreign.opening import open_foreign

STEM = "diffusion_pytorch_model"


@pytest.mark.parametrize("part", ["", "transformer"])
@pytest.mark.parametrize("form", ["safetensors", "shards", "bin", "bin shards"])
def test_a_pipeline_or_its_transformer(tmp_path, form, part):
    folder = write_pipeline(tmp_path / "sit", form=form) / part
    assert is_foreign_folder(folder)
    found = open_foreign(folder)
    assert_golden(found.weights["model"])
    assert found.layout == "diffusers"
    assert found.settings == transformer_config()
    assert len(found.notes) == 2
    assert not (tmp_path / "sit" / "trace").exists()


def test_large_weights_below_the_folder_of_a_pipeline(tmp_path, monkeypatch):
    # Nothing is small enough to pass unmeasured then.
    monkeypatch.setattr(weight_file, "_SMALL_BYTES", 0)
    assert_golden(open_foreign(write_pipeline(tmp_path / "sit")).weights["model"])


@pytest.mark.parametrize("form", ["safetensors", "shards"])
def test_without_learned_sigma_whatever_its_config_says(tmp_path, form):
    found = open_foreign(write_pipeline(tmp_path / "sit", without_sigma(), form=form))
    assert_golden(found.weights["model"])


def plain_shards(folder: Path) -> Path:
    folder.mkdir()
    return write_shards(folder, ORIGINAL, "model")


def test_shards_of_plain_weights(tmp_path):
    plain_shards(tmp_path / "hub")
    assert is_foreign_folder(tmp_path / "hub")
    found = open_foreign(tmp_path / "hub")
    assert found.layout == "sit"
    assert_golden(found.weights["model"])


def test_files_may_be_links_as_in_the_cache_of_the_hub(tmp_path):
    snapshot, blobs = plain_shards(tmp_path / "hub").parent, tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))
    assert_golden(open_foreign(snapshot).weights["model"])


def test_hashes_identify_weights(tmp_path):
    one = write_pipeline(tmp_path / "one")
    file = one / "transformer" / f"{STEM}.safetensors"
    assert sha256_of_weights(one, setting="x") == sha256_of(file)
    shards = [write_pipeline(tmp_path / name, form="shards") for name in ("two", "three")]
    hashes = {sha256_of_weights(folder, setting="x") for folder in shards}
    assert len(hashes) == 1
    part = shards[0] / "transformer" / f"{STEM}-00002-of-00002.safetensors"
    save_file({n: v + 1 for n, v in load_file(part).items()}, part)
    assert sha256_of_weights(shards[0], setting="x") not in hashes


def test_exported_models_are_not_foreign(tmp_path):
    folder = tmp_path / "export"
    provenance = {"weights": "ema", "step": 1}
    write_model(folder, ORIGINAL, config={"model": {}}, provenance=provenance)
    assert not is_foreign_folder(folder)
    with pytest.raises(CheckpointError, match="srepa-ds has exported: there is nothing to convert"):
        open_foreign(folder)
    document = folder / "config.json"
    for text in ("{}", "[]", "{"):
        document.write_text(text)
        assert not is_foreign_folder(folder)
    document.unlink()
    assert not is_foreign_folder(folder)
    document.write_text(json.dumps({"hidden_size": 64}))
    assert is_foreign_folder(folder)


def edited(**changes):
    def edit(folder: Path) -> None:
        path = next(folder.glob("*.index.json"))
        document = json.loads(path.read_text())
        path.write_text(json.dumps(document | changes))

    return edit


def mapped(change):
    def edit(folder: Path) -> None:
        path = next(folder.glob("*.index.json"))
        document = json.loads(path.read_text())
        change(document["weight_map"], folder)
        path.write_text(json.dumps(document))

    return edit


def elsewhere(name: str):
    """The first tensor lies in another file, which is there."""

    def change(places: dict[str, str], folder: Path) -> None:
        shard = folder / places["pos_embed"]
        (folder.parent / "outside.safetensors").write_bytes(shard.read_bytes())
        places["pos_embed"] = name.format(folder=folder.parent)

    return mapped(change)


def swapped(places: dict[str, str], folder: Path) -> None:
    places["pos_embed"] = next(place for place in places.values() if place != places["pos_embed"])


def twice(folder: Path) -> None:
    path = next(folder.glob("*.index.json"))
    path.write_text(path.read_text().replace('"x_embedder.proj.weight"', '"pos_embed"'))


def without(name: str):
    return lambda places, folder: places.pop(name)


def linked(folder: Path) -> None:
    """A folder that a shard's name leads through: only names of files are taken."""
    (folder / "sub").symlink_to(folder.parent)
    elsewhere("sub/outside.safetensors")(folder)


NO_FILE = r"\.index\.json names '.*', which is no file in its folder; it is damaged or malicious"
FAULTS = {
    "above": (elsewhere("../outside.safetensors"), NO_FILE),
    "absolute": (elsewhere("{folder}/outside.safetensors"), NO_FILE),
    "through a link": (linked, NO_FILE),
    "backslash": (elsewhere("..\\outside.safetensors"), NO_FILE),
    "no text": (mapped(lambda places, folder: places.update(pos_embed=3)), NO_FILE),
    "no weights": (elsewhere("run.py"), "names 'run.py', which is no file of weights"),
    "the index": (elsewhere("model.safetensors.index.json"), "which is no file of weights"),
    "missing": (
        lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
        "00002.safetensors: no such file; correct the folder: model.safetensors.index.json names",
    ),
    "in another": (
        mapped(swapped),
        r"(lacks|has) pos_embed, which model.* (says are|does not say are) in it",
    ),
    "twice": (twice, "the key 'pos_embed' is given twice"),
    "unlisted": (mapped(without("pos_embed")), "has pos_embed, which .* does not say are in it"),
    "no map": (edited(weight_map=[]), "it has no weight_map"),
    "empty map": (edited(weight_map={}), "it has no weight_map"),
    "no object": (lambda f: next(f.glob("*.json")).write_text("[1]"), "it has no weight_map"),
    "no JSON": (lambda f: next(f.glob("*.json")).write_text("{"), r"index\.json: "),
    "torn": (
        lambda f: next(f.glob("*.safetensors")).write_bytes(b"\0" * 9),
        "safetensors: cannot be read: it is damaged",
    ),
    "a bomb": (
        lambda f: next(f.glob("*.json")).write_text("[" * 10**6),
        "index.json: it is nested too deeply",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_an_index_has_one_message(tmp_path, fault):
    edit, words = FAULTS[fault]
    folder = plain_shards(tmp_path / "hub").parent
    edit(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_foreign(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_tensor_in_two_shards_is_named(tmp_path):
    folder = plain_shards(tmp_path / "hub").parent
    second = folder / "model-00002-of-00002.safetensors"
    save_file({**load_file(second), "pos_embed": torch.ones(3)}, second)
    with pytest.raises(CheckpointError, match=r"00002\.safetensors has pos_embed, which model"):
        open_foreign(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", r"config\.json: .*; download the folder again"), ("[]", r"config\.json is no JSON obj")],
)
def test_a_damaged_config_is_named(tmp_path, content, words):
    folder = write_pipeline(tmp_path / "sit")
    (folder / "transformer" / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=words):
        open_foreign(folder)


def test_a_folder_without_weights_names_what_is_there(tmp_path):
    (tmp_path / "sit").mkdir()
    with pytest.raises(CheckpointError, match=r"sit holds nothing, and no weights under a name"):
        open_foreign(tmp_path / "sit")
    (tmp_path / "sit" / "weights.pt").touch()
    assert not is_foreign_folder(tmp_path / "sit")
    with pytest.raises(CheckpointError, match=r"holds weights.pt, and no .*; correct the path, or"):
        open_foreign(tmp_path / "sit")
