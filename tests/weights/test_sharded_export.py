"""Exported models in several files and in fewer bits: the same weights, whole or named."""

import hashlib
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import load_state_dict_from_file
from kills import killed_at
from safetensors.torch import load_file

from srepa_ds.errors import CheckpointError, OutputError
from srepa_ds.files import sha256_of
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig
from srepa_ds.schema import to_tree
from srepa_ds.weights.exported import (
    check_export,
    read_document,
    read_model,
    stored_tensors,
    write_model,
)
from srepa_ds.weights.initial import read_initial_weights

SIZES = SiTConfig(
    variant="SiT-Ti/2", input_size=8, in_channels=3, num_classes=4, depth=1, hidden_size=24,
    num_heads=2,
)  # fmt: skip
INDEX = "model.safetensors.index.json"


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    model = SiT(SIZES, torch.Generator().manual_seed(seed))
    return {**model.state_dict(), "projectors.0.weight": torch.full((2, 2), float(seed))}


def write(folder: Path, seed: int = 0, *, size: str | None = "20KB", run="a", **settings) -> None:
    write_model(
        folder,
        settings.pop("tensors", None) or state(seed),
        config={"model": to_tree(SIZES), "run": {"folder": f"runs/{run}"}},
        provenance={"checkpoint": "abc", "step": seed, "weights": "ema"},
        max_shard_size=size,
        **settings,
    )


def seed_of(folder: Path) -> float:
    return stored_tensors(read_model(folder).document)["projectors.0.weight"].unique().item()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_shards_hold_the_same_weights_as_one_file(tmp_path):
    write(tmp_path / "one", size=None)
    write(tmp_path / "many")
    shards = sorted(names(tmp_path / "many") - {INDEX, "config.json"})
    count = len(shards)
    assert count > 2
    assert shards == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    expected = load_file(tmp_path / "one" / "model.safetensors")
    found = {}
    for name in shards:
        own = load_file(tmp_path / "many" / name)
        size = sum(value.numel() * value.element_size() for value in own.values())
        assert size <= 20_000 or len(own) == 1
        assert not found.keys() & own.keys()
        found |= own
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    models = [read_model(tmp_path / name).model.state_dict() for name in ("one", "many")]
    assert all(torch.equal(models[1][name], value) for name, value in models[0].items())
    initial = read_initial_weights(tmp_path / "many", which="ema")
    assert initial.keys() == expected.keys() - {"pos_embed"}


def test_the_index_is_the_hubs(tmp_path):
    write(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    expected = state()
    assert index["metadata"]["total_size"] == sum(4 * value.numel() for value in expected.values())
    assert index["weight_map"].keys() == expected.keys()
    for name, shard in index["weight_map"].items():
        assert torch.equal(load_state_dict_from_file(tmp_path / shard)[name], expected[name])


def test_the_hash_is_that_of_the_shards_hashes(tmp_path):
    write(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    shards = sorted(name for name in document["files"] if name != INDEX)
    assert document["version"] == 2
    assert document["files"] == {name: sha256_of(tmp_path / name) for name in [*shards, INDEX]}
    lines = "".join(f"{name} {document['files'][name]}\n" for name in shards)
    expected = hashlib.sha256(lines.encode()).hexdigest()
    assert document["sha256"] == read_model(tmp_path).sha256 == expected


def test_a_size_above_the_models_gives_one_file_of_the_first_version(tmp_path):
    write(tmp_path / "one", size=None)
    write(tmp_path / "large", size="1GB")
    for name in ("model.safetensors", "config.json"):
        one, large = (tmp_path / folder / name for folder in ("one", "large"))
        assert large.read_bytes() == one.read_bytes()
    assert json.loads((tmp_path / "large" / "config.json").read_text())["version"] == 1


def first(folder: Path) -> Path:
    return min(folder.glob("model-*"))


def edit(folder: Path, **changes) -> None:
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | changes))


def rename_in_document(folder: Path, name: str) -> None:
    files = json.loads((folder / "config.json").read_text())["files"]
    edit(folder, files={name if key == first(folder).name else key: v for key, v in files.items()})


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


SHARD = r"model-00001-of-\d{5}\.safetensors"
DAMAGES = {
    "missing": (lambda f: first(f).unlink(), f"{SHARD}: No such file"),
    "torn": (lambda f: first(f).write_bytes(first(f).read_bytes()[:-9]), f"{SHARD} has changed"),
    "flipped": (lambda f: flip(first(f)), f"{SHARD} has changed since it was exported"),
    "a pointer": (
        lambda f: first(f).write_text("version https://git-lfs.github.com/spec/v1"),
        f"{SHARD}: it is a Git LFS pointer",
    ),
    "no index": (lambda f: (f / INDEX).unlink(), "index.json: No such file"),
    "another index": (lambda f: (f / INDEX).write_text("{}"), "index.json has changed"),
    "outside": (
        lambda f: rename_in_document(f, "../model.safetensors"),
        "names '../model.safetensors', which is no weight file in its folder",
    ),
    "another file": (
        lambda f: rename_in_document(f, "notes.txt"),
        "names 'notes.txt', which is no weight file",
    ),
    "no files": (lambda f: edit(f, files={}), "it names no weight file"),
    "files as a list": (lambda f: edit(f, files=[]), "'files' is not an object"),
    "no hash of a file": (lambda f: edit(f, files={INDEX: None}), "is not text"),
    "another hash": (lambda f: edit(f, sha256="0" * 64), "its hash is not that of its files"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path, damage):
    act, words = DAMAGES[damage]
    write(tmp_path)
    act(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        check_export(tmp_path)


@pytest.mark.parametrize("sizes", [("40KB", "40KB"), (None, "40KB"), ("40KB", None)])
def test_a_kill_at_any_moment_leaves_a_model_or_is_recognised(tmp_path, sizes):
    before, after = sizes
    folder, seen, killed, moment = tmp_path / "model", set(), True, 0
    while killed:
        write(folder, seed=1, size=before)
        killed = killed_at(moment, partial(write, folder, seed=2, size=after), folder)
        seen.add(found := seed_or_interrupted(folder))
        write(folder, seed=3, size=after)
        assert seed_or_interrupted(folder) == 3
        assert not [name for name in names(folder) if name.endswith(".partial")]
        moment += 2
    assert found == 2
    assert seen >= {1, 2}


def seed_or_interrupted(folder: Path) -> float | str:
    try:
        return seed_of(folder)
    except CheckpointError as error:
        if "holds an interrupted export" in str(error):
            return "interrupted"
        raise


def test_another_number_of_files_leaves_none_of_the_earlier(tmp_path):
    kept = []
    for size in ("20KB", None, "8KB", "20KB"):
        write(tmp_path, size=size)
        check_export(tmp_path)
        kept.append(names(tmp_path) - {INDEX, "config.json"})
    assert kept[1] == {"model.safetensors"}
    assert kept[3] == kept[0]
    assert len(kept[2]) > len(kept[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fewer_bits_keep_the_position_embedding(tmp_path, dtype):
    write(tmp_path, size=None, dtype=dtype)
    found, expected = load_file(tmp_path / "model.safetensors"), state()
    assert found.keys() == expected.keys()
    assert torch.equal(found["pos_embed"], expected["pos_embed"])
    for name, value in found.items():
        if name != "pos_embed":
            assert value.dtype == dtype
            assert torch.equal(value, expected[name].to(dtype)), name
    model = read_model(tmp_path).model
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(model.state_dict()[name], found[name].float())


def test_a_value_beyond_fp16_is_named_and_the_earlier_model_stays(tmp_path):
    write(tmp_path, seed=1)
    large = {**state(2), "final_layer.linear.bias": torch.full((12,), 7e4)}
    with pytest.raises(CheckpointError, match=r"final_layer\.linear\.bias has values up to 7e\+04"):
        write(tmp_path, seed=2, tensors=large, dtype=torch.float16)
    assert seed_of(tmp_path) == 1
    write(tmp_path, seed=2, tensors=large, dtype=torch.bfloat16)
    assert seed_of(tmp_path) == 2


def test_a_model_of_another_run_is_asked_about(tmp_path):
    write(tmp_path, seed=1, run="a")
    write(tmp_path, seed=2, run="a", size=None)
    words = r"holds a model of the run runs/a \[.*\] in the format srepa_ds, and .*runs/b"
    with pytest.raises(OutputError, match=f"{words}.*--replace"):
        write(tmp_path, seed=3, run="b")
    assert seed_of(tmp_path) == 2
    (tmp_path / "README.md").write_text("about run a")
    write(tmp_path, seed=3, run="b", replace=True)
    assert seed_of(tmp_path) == 3
    assert "README.md" not in names(tmp_path)


def test_a_model_of_another_format_is_asked_about(tmp_path):
    (tmp_path / "0000010.pt").write_bytes(b"")
    # A trainer's checkpoints are not replaced, whatever is asked for.
    for replace in (False, True):
        with pytest.raises(OutputError, match=r"unknown in the format repa, .*srepa_ds; choose an"):
            write(tmp_path, replace=replace)
    assert names(tmp_path) == {"0000010.pt"}
    pipeline = tmp_path / "pipeline"
    (pipeline / "transformer").mkdir(parents=True)
    (pipeline / "model_index.json").write_text("{}")
    # Somebody else's pipeline is not taken for an export, whatever is asked for.
    for replace in (False, True):
        with pytest.raises(OutputError, match="holds files other than an exported model"):
            write(pipeline, replace=replace)


@pytest.mark.parametrize("replace", [False, True])
def test_what_is_no_model_is_never_replaced(tmp_path, replace):
    write(tmp_path / "model")
    (tmp_path / "model" / "0000010.pt").write_bytes(b"mine")
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_text("mine")
    for folder in (tmp_path / "model", tmp_path / "card"):
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(OutputError, match="holds files other than an exported model"):
            write(folder, replace=replace)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_document_of_a_model_in_shards_names_them(tmp_path):
    write(tmp_path)
    assert read_document(tmp_path).files.keys() == names(tmp_path) - {"config.json"}
