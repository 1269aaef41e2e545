"""Exported models on disk: read back exactly, replaced atomically, never over other files."""

import json
import stat

import pytest
import torch
from builders import largest_file
from safetensors.torch import load_file, save_file

from srepa_ds.errors import CheckpointError, OutputError
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig
from srepa_ds.schema import to_tree
from srepa_ds.weights.exported import DOCUMENT, WEIGHTS, read_model, write_model

CONFIG = SiTConfig(
    variant="SiT-Ti/2", input_size=8, in_channels=3, num_classes=4, depth=1, hidden_size=24,
    num_heads=2,
)  # fmt: skip
PROVENANCE = {"checkpoint": "abc", "step": 5, "weights": "ema"}


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    model = SiT(CONFIG, torch.Generator().manual_seed(seed))
    return {**model.state_dict(), "projectors.0.weight": torch.full((2, 2), float(seed))}


def write(folder, seed: int = 0) -> None:
    write_model(folder, state(seed), config={"model": to_tree(CONFIG)}, provenance=PROVENANCE)


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_was_written_is_read(tmp_path):
    write(tmp_path / "deep" / "model")
    found = read_model(tmp_path / "deep" / "model")
    expected = state()
    weights = found.model.state_dict()
    assert weights.keys() == expected.keys() - {"projectors.0.weight"}
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert not found.model.training
    assert not any(parameter.requires_grad for parameter in found.model.parameters())
    assert dict(found.provenance) == PROVENANCE
    assert found.config["model"] == to_tree(CONFIG)
    assert names(tmp_path / "deep") == {"model"}
    assert names(tmp_path / "deep" / "model") == {WEIGHTS, DOCUMENT}


def test_the_same_weights_make_the_same_bytes_and_hash(tmp_path):
    for name in "ab":
        write(tmp_path / name)
    write(tmp_path / "c", seed=1)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    hashes = [read_model(tmp_path / name).sha256 for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]


def test_others_may_read_it_as_they_may_its_document(tmp_path):
    write(tmp_path / "model")
    modes = [stat.S_IMODE((tmp_path / "model" / n).stat().st_mode) for n in (WEIGHTS, DOCUMENT)]
    assert modes[0] == modes[1]


def test_an_earlier_model_is_replaced(tmp_path):
    write(tmp_path / "model", seed=1)
    write(tmp_path / "model", seed=2)
    assert load_file(tmp_path / "model" / WEIGHTS)["projectors.0.weight"].unique() == 2
    assert names(tmp_path) == {"model"}


@pytest.mark.parametrize("first", [False, True])
def test_a_full_disk_leaves_the_earlier_model(tmp_path, first):
    if not first:
        write(tmp_path / "model", seed=1)
    with largest_file(5000), pytest.raises(OutputError, match="cannot write the model"):
        write(tmp_path / "model", seed=2)
    assert names(tmp_path) == (set() if first else {"model"})
    if not first:
        assert load_file(tmp_path / "model" / WEIGHTS)["projectors.0.weight"].unique() == 1


def hub_model(folder):
    """Writes the files of another library's model."""
    (folder / DOCUMENT).write_text('{"architectures": ["ViT"]}')
    save_file({"x": torch.zeros(1)}, folder / WEIGHTS)


def notes_beside_ours(folder):
    folder.rmdir()
    write(folder)
    (folder / "notes.txt").write_text("keep me")


FOREIGN = {
    "a file": lambda folder: (folder / "thesis.txt").write_text("years of work"),
    "a model of another library": hub_model,
    "weights alone": lambda folder: save_file({"x": torch.zeros(1)}, folder / WEIGHTS),
    "a torn document": lambda folder: (folder / DOCUMENT).write_text("{"),
    "something beside a model of ours": notes_beside_ours,
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_folder_is_left_alone(tmp_path, case):
    folder = tmp_path / "model"
    folder.mkdir()
    FOREIGN[case](folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OutputError, match="holds files other than an exported model"):
        write(folder, seed=2)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert names(tmp_path) == {"model"}


def test_an_empty_folder_is_taken_and_a_file_is_not(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(OutputError, match="Not a directory"):
            write(folder)
    assert (tmp_path / "file").read_text() == "mine"


def edit(folder, **changes):
    document = json.loads((folder / DOCUMENT).read_text()) | changes
    (folder / DOCUMENT).write_text(json.dumps(document))


def drop(folder, key):
    document = json.loads((folder / DOCUMENT).read_text())
    del document[key]
    (folder / DOCUMENT).write_text(json.dumps(document))


def keep_weights(folder, **changes):
    tensors = {**state(), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / WEIGHTS)


DAMAGES = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "does not hold an exported model"),
    "no document": (lambda f: (f / DOCUMENT).unlink(), "does not hold an exported model"),
    "torn weights": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]),
        "does not hold an exported model",
    ),
    "torn document": (lambda f: (f / DOCUMENT).write_text("{"), "does not hold an exported model"),
    "a list": (lambda f: (f / DOCUMENT).write_text("[]"), "does not describe a model"),
    "another format": (lambda f: edit(f, format="other"), "is of format"),
    "another version": (lambda f: edit(f, version=9), "is of format"),
    "no config": (lambda f: drop(f, "config"), "lacks 'config'"),
    "no provenance": (lambda f: drop(f, "provenance"), "lacks 'provenance'"),
    "a faulty config": (
        lambda f: edit(f, config={"model": {**to_tree(CONFIG), "depth": 0}}),
        "depth: Input should be greater than 0",
    ),
    "another size": (
        lambda f: edit(f, config={"model": {**to_tree(CONFIG), "depth": 2}}),
        "does not fit its config",
    ),
    "a weight too few": (lambda f: keep_weights(f, pos_embed=None), "pos_embed"),
    "a weight too many": (lambda f: keep_weights(f, extra=torch.zeros(1)), "extra"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path, damage):
    act, words = DAMAGES[damage]
    write(tmp_path / "model")
    act(tmp_path / "model")
    with pytest.raises(CheckpointError, match=words):
        read_model(tmp_path / "model")


def test_without_a_model_it_says_how_to_make_one(tmp_path):
    with pytest.raises(CheckpointError, match="make one with `srepa-ds export CONFIG`"):
        read_model(tmp_path / "never")
