"""Stored tokens: which ones training accepts, and its message about all others."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from builders import SmallWorld
from safetensors.torch import load_file, save_file

from srepa_ds.commands.store_teacher_tokens import store_tokens
from srepa_ds.config.experiment import load_config
from srepa_ds.data.shard_index import INDEX_NAME
from srepa_ds.data.shards import ShardDataset
from srepa_ds.distributed import ranks
from srepa_ds.errors import DataError
from srepa_ds.files import sha256_of
from srepa_ds.training.stored_teachers import open_stores, teacher_identity

INT8, BF16 = (f"alignments.0.stored_tokens={storage}" for storage in ("int8", "bf16"))


@pytest.fixture(scope="module")
def stored(small_world, tmp_path_factory) -> SmallWorld:
    """The small world with the int8 tokens of its teacher."""
    world = small_world.copied_to(tmp_path_factory.mktemp("stored") / "world")
    store_tokens(load_config(world.config, [INT8]))
    ranks.close()
    return world


@pytest.fixture
def spoilt(stored, tmp_path) -> SmallWorld:
    """A copy of it to spoil."""
    return stored.copied_to(tmp_path / "copy")


def opened(world: SmallWorld, *overrides: str):
    config = load_config(world.config, overrides)
    return open_stores(config, ShardDataset(config.data.folder))


def only_store(world: SmallWorld) -> Path:
    (folder,) = (world.folder / "shards" / "teachers").iterdir()
    return folder


def test_there_is_one_entry_per_alignment(stored):
    assert opened(stored) == (None,)
    tree = yaml.safe_load(stored.config.read_text())
    (alignment,) = tree["alignments"]
    both = [alignment, {**alignment, "depth": 1, "stored_tokens": "int8"}]
    none, store = opened(stored, f"alignments={json.dumps(both)}")
    assert none is None
    assert (store.folder, store.grid, store.width) == (only_store(stored), (8, 8), 32)
    dataset = ShardDataset(stored.folder / "shards", [store])
    assert len(dataset.read(torch.tensor([3, 80])).teacher_tokens) == 1


def test_what_is_missing_names_the_command(spoilt):
    shutil.rmtree(spoilt.folder / "shards" / "teachers")
    with pytest.raises(DataError) as caught:
        opened(spoilt, INT8)
    assert str(caught.value).startswith("alignments.0.stored_tokens: ")
    assert str(caught.value).endswith(
        "does not exist; run `srepa-ds prepare CONFIG --teacher` first"
    )


def test_what_is_unfinished_names_the_command(spoilt):
    (only_store(spoilt) / INDEX_NAME).unlink()
    with pytest.raises(DataError, match="is not finished; run `srepa-ds prepare CONFIG --teacher`"):
        opened(spoilt, INT8)


def other_weights(world: SmallWorld) -> str:
    tensors = load_file(world.folder / "teacher.safetensors")
    tensors["norm.bias"] += 1
    save_file(tensors, world.folder / "teacher.safetensors")
    return INT8


DIFFERENT = {
    "weights": (other_weights, r"teacher\.weights\.sha256 is '[0-9a-f]{64}' there and '"),
    "dtype": (lambda _: f"{INT8} alignments.0.teacher.dtype=bf16",
              "teacher.dtype is 'fp32' there and 'bf16' here"),
    "norm": (lambda _: f"{INT8} alignments.0.teacher.spec.final_norm=false",
             "teacher.spec.final_norm is True there and False here"),
    "storage": (lambda _: BF16, "storage is 'int8' there and 'bf16' here"),
}  # fmt: skip


@pytest.mark.parametrize("what", DIFFERENT)
def test_tokens_of_another_teacher_are_refused_naming_what_differs(spoilt, what):
    change, words = DIFFERENT[what]
    overrides = change(spoilt).split()
    with pytest.raises(
        DataError, match=r"does not exist; run .* first\nvit_tiny.*exists, but"
    ) as e:
        opened(spoilt, *overrides)
    assert e.match(words)
    assert str(e.value).count(" there and ") == 1


def test_a_store_in_the_place_of_another_is_refused(spoilt):
    folder = only_store(spoilt)
    config = load_config(spoilt.config, [other_weights(spoilt)])
    store_tokens(config)
    ranks.close()
    (other,) = {*folder.parent.iterdir()} - {folder}
    shutil.rmtree(other)
    folder.rename(other)
    with pytest.raises(DataError, match=r"holds tokens of another teacher: weights\.sha256 is"):
        opened(spoilt, INT8)
    # Storing again does not take it for finished either.
    with pytest.raises(DataError, match="holds tokens of another teacher"):
        store_tokens(config)
    ranks.close()


def test_tokens_of_other_images_are_refused(spoilt):
    path = spoilt.folder / "shards" / INDEX_NAME
    index = json.loads(path.read_text())
    index["shards"][1]["sha256"] = "0" * 64
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"tokens-00001\.safetensors: tokens of 40 images that are"):
        opened(spoilt, INT8)


def test_missing_weights_are_named(spoilt):
    (spoilt.folder / "teacher.safetensors").unlink()
    with pytest.raises(DataError, match=r"teacher\.safetensors: No such file.*teacher\.weights"):
        opened(spoilt, INT8)


def test_weights_that_changed_since_they_were_trained_are_named(spoilt):
    folder = spoilt.folder / "trained"
    folder.mkdir()
    weights = (spoilt.folder / "teacher.safetensors").rename(folder / "model.safetensors")
    config = load_config(spoilt.config, [f"alignments.0.teacher.weights={weights}"])
    report = folder / "teacher.json"
    for text in ("", "[]", json.dumps({"sha256": sha256_of(weights)})):
        report.write_text(text)
        assert teacher_identity(config.alignments[0].teacher, image_size=(16, 16))
    report.write_text(json.dumps({"sha256": "0" * 64}))
    with pytest.raises(DataError, match=r"model\.safetensors: contents changed since it was writ"):
        teacher_identity(config.alignments[0].teacher, image_size=(16, 16))
    with pytest.raises(DataError, match="train the teacher again with `srepa-ds teacher"):
        opened(spoilt, INT8, f"alignments.0.teacher.weights={weights}")


def test_weights_are_known_by_their_contents_or_by_timm_s_name(small_world):
    config = load_config(small_world.config).alignments[0].teacher
    identity = teacher_identity(config, image_size=(16, 16))
    assert json.loads(json.dumps(identity)) == identity
    assert str(small_world.folder) not in json.dumps(identity)
    published = config.model_copy(update={"weights": None})
    named = teacher_identity(published, image_size=(16, 16))
    assert named["weights"] == {"timm": "vit_tiny_patch16_224"}
    assert teacher_identity(config, image_size=(16, 32)) != identity
