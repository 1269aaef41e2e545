"""The source `lightningdit`."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from foreign_data import write_lightningdit
from safetensors.torch import load_file, save_file

from srepa_ds.data.sources.lightningdit import LightningDitConfig
from srepa_ds.data.sources.source import Source
from srepa_ds.errors import DataError

FIRST = "latents_rank00_shard000.safetensors"
SECOND = "latents_rank00_shard001.safetensors"
LAST = "latents_rank01_shard000.safetensors"


def opened(path, **settings):
    return LightningDitConfig(kind="lightningdit", path=path, **settings).opened()


@pytest.fixture
def folder(tmp_path):
    """Eight latents of 32 channels in three files."""
    return write_lightningdit(tmp_path / "latents")


def test_rows_are_samples_in_the_order_of_the_names(folder):
    source = opened(folder)
    assert isinstance(source, Source)
    files = [load_file(folder / name) for name in (FIRST, SECOND, LAST)]
    latents = torch.cat([file["latents"] for file in files])
    mirrored = torch.cat([file["latents_flip"] for file in files])
    with ThreadPoolExecutor(4) as pool:
        items = list(pool.map(source.item, range(8)))
    assert torch.equal(torch.stack([item.moments for item in items]), latents)
    assert torch.equal(torch.stack([item.moments_mirrored for item in items]), mirrored)
    assert all(item.image is None for item in items)
    assert source.labels.tolist() == [0, 1, 2, 1, 2, 2, 3, 4]
    assert source.class_names == tuple("01234")
    assert source.key(0) == f"{FIRST}:0"
    assert source.key(4) == f"{SECOND}:1"
    assert source.latents.values == "samples"
    assert source.latents.latent_shape == (32, 2, 2)
    assert source.latents.mirrored
    assert not source.latents.has_images


def test_statistics_become_shift_and_scale(folder):
    facts = opened(folder, multiplier=2.0).latents.facts
    stats = torch.load(folder / "latents_stats.pt", weights_only=True)
    z = torch.randn(3, 32, 2, 2)
    expected = (z - stats["mean"]) / stats["std"] * 2.0
    shift, scale = (torch.tensor(facts[name]).view(-1, 1, 1) for name in ("shift", "scale"))
    torch.testing.assert_close((z - shift) * scale, expected)
    assert torch.equal(torch.tensor(facts["mean"]), stats["mean"].flatten())
    assert torch.equal(torch.tensor(facts["std"]), stats["std"].flatten())


def test_statistics_are_not_required(folder):
    (folder / "latents_stats.pt").unlink()
    assert opened(folder).latents.facts == {"origin": "lightningdit"}


class Spy:
    """Makes a folder if it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    ("stats", "words"),
    [
        ({"mean": torch.zeros(1, 32, 1, 1)}, "expected std of 32 channels"),
        ({"mean": torch.zeros(4), "std": torch.ones(32)}, "expected mean of 32 channels"),
        ({"mean": torch.zeros(32), "std": torch.zeros(32)}, "std not positive"),
        ({"mean": torch.full((32,), torch.nan), "std": torch.ones(32)}, "mean is not finite"),
        ([1, 2], "holds a list"),
    ],
)
def test_statistics_that_do_not_fit_are_named(folder, stats, words):
    torch.save(stats, folder / "latents_stats.pt")
    with pytest.raises(DataError, match=rf"latents_stats.pt: .*{words}"):
        opened(folder)


def test_statistics_cannot_run_code(folder, tmp_path):
    torch.save({"mean": Spy(tmp_path / "spied")}, folder / "latents_stats.pt")
    with pytest.raises(DataError, match=r"latents_stats.pt: cannot be read"):
        opened(folder)
    assert not (tmp_path / "spied").exists()


def test_half_precision_and_latents_without_mirrored_ones_are_read(folder):
    for name in (FIRST, SECOND, LAST):
        tensors = load_file(folder / name)
        half = {"latents": tensors["latents"].half(), "labels": tensors["labels"]}
        save_file(half, folder / name)
    source = opened(folder)
    item = source.item(3)
    assert not source.latents.mirrored
    assert item.moments_mirrored is None
    assert item.moments.dtype == torch.float32
    assert torch.equal(item.moments, half_of(folder / SECOND))


def half_of(path):
    return load_file(path)["latents"][0].float()


def test_the_fingerprint_is_of_the_contents_not_of_the_place(folder, tmp_path):
    first = opened(folder).fingerprint
    moved = folder.rename(tmp_path / "other")
    assert opened(moved).fingerprint == first
    tensors = load_file(moved / LAST)
    save_file({**tensors, "labels": tensors["labels"] + 1}, moved / LAST)
    assert opened(moved).fingerprint != first


def changed(folder, name, **tensors):
    found = {**load_file(folder / name), **tensors}
    save_file({key: value for key, value in found.items() if value is not None}, folder / name)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"latents": None}, "expected latents .*, found none"),
        ({"latents": torch.ones(2, 4)}, r"found F32 \(2, 4\)"),
        ({"latents": torch.ones(2, 32, 2, 2, dtype=torch.int64)}, "found I64"),
        ({"labels": None}, "expected int64 labels of 2 latents"),
        ({"labels": torch.ones(3, dtype=torch.int64)}, "expected int64 labels of 2 latents"),
        ({"latents_flip": torch.ones(2, 32, 2, 1)}, "latents and latents_flip differ"),
        ({"labels": torch.tensor([-1, 0])}, "labels run from -1 to 4"),
    ],
)
def test_files_of_another_form_are_named(folder, tensors, words):
    changed(folder, SECOND, **tensors)
    with pytest.raises(DataError, match=words):
        opened(folder)


def test_files_of_different_shapes_are_refused(folder):
    other = torch.ones(3, 4, 2, 2)
    changed(folder, LAST, latents=other, latents_flip=other.clone())
    with pytest.raises(DataError, match=rf"{LAST}: .* keep one extraction a folder"):
        opened(folder)


def test_damage_is_named(folder):
    source = opened(folder)
    content = (folder / LAST).read_bytes()
    (folder / LAST).write_bytes(content[:200])
    with pytest.raises(DataError, match=rf"{LAST}: was truncated while it was in use"):
        source.item(7)
    (folder / LAST).write_bytes(content[:-8])
    with pytest.raises(DataError, match=rf"{LAST}: not a readable file of latents \(.*copy it"):
        opened(folder)
    (folder / LAST).unlink()
    with pytest.raises(DataError, match=rf"{LAST}: No such file"):
        source.item(7)


def test_latents_that_are_not_finite_are_refused(folder):
    latents = load_file(folder / FIRST)["latents"]
    latents[1, 3, 0, 0] = torch.inf
    changed(folder, FIRST, latents=latents)
    source = opened(folder)
    source.item(0)
    with pytest.raises(DataError, match="not finite"):
        source.item(1)


def test_folders_without_latents_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"correct source.path"):
        opened(tmp_path)
    with pytest.raises(DataError, match="nowhere: No such file"):
        opened(tmp_path / "nowhere")


def test_the_number_of_classes_can_be_given(folder):
    assert len(opened(folder, num_classes=1000).class_names) == 1000
    with pytest.raises(DataError, match="labels run from 0 to 4, expected 0 to 3"):
        opened(folder, num_classes=4)
