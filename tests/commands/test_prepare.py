import logging
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import contents
from PIL import Image
from places import ROOT

from srepa_ds.commands.prepare import prepare
from srepa_ds.data.prepared_folder import MARKER_NAME
from srepa_ds.data.sources.digits import Digits, DigitsConfig
from srepa_ds.data.sources.source import Source
from srepa_ds.data.split import stratified_split
from srepa_ds.errors import ConfigError, DataError, OutputError
from srepa_ds.preparation.config import PrepareConfig
from srepa_ds.preparation.preview import PREVIEW_NAME
from srepa_ds.schema import validated
from srepa_ds.trees import load_tree

CONFIGS = ROOT / "configs"


def config_for(output, **changes):
    tree = load_tree(CONFIGS / "digits-prepare.yaml")
    return validated(PrepareConfig, {**tree, "output": str(output), **changes}, source="test")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    output = tmp_path_factory.mktemp("prepare") / "data" / "digits"
    return output, prepare(config_for(output))


def test_every_digit_is_in_exactly_one_part(prepared):
    _, parts = prepared
    assert {name: len(part) for name, part in parts.items()} == {"train": 1438, "heldout": 359}
    source = Digits()
    counts = torch.stack([part.labels.bincount() for part in parts.values()])
    assert torch.equal(counts.sum(0), source.labels.bincount())
    assert torch.equal(counts[1], (source.labels.bincount() * 0.2).round().long())
    for part in parts.values():
        part.verify()


def test_images_are_the_digits_enlarged(prepared):
    _, parts = prepared
    source = Digits()
    split = stratified_split(source.labels, holdout_fraction=0.2, seed=0)
    for row in (0, 100, 358):
        index = int(split.heldout[row])
        item = source.item(index)
        batch = parts["heldout"].read(torch.tensor([row]))
        expected = np.asarray(item.image.resize((16, 16), Image.Resampling.BICUBIC))
        assert batch.labels.tolist() == [int(source.labels[index])]
        for channel in batch.images[0]:
            assert np.array_equal(channel.numpy(), expected)


def test_index_tells_how_it_was_made(prepared):
    _, parts = prepared
    index = parts["heldout"].index
    assert index.class_names == tuple("0123456789")
    assert index.source == {
        "source": {"kind": "digits", "fingerprint": Digits().fingerprint},
        "image_size": 16,
        "holdout_fraction": 0.2,
        "samples_per_shard": 500,
        "seed": 0,
        "part": "heldout",
    }


def test_preview_shows_the_first_images(prepared):
    output, _ = prepared
    for part in ("train", "heldout"):
        preview = Image.open(output / part / PREVIEW_NAME)
        assert min(preview.size) > 400
        assert len(preview.getcolors(1 << 20)) > 100


def test_again_is_a_no_op_that_says_so(prepared, caplog):
    output, _ = prepared
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with caplog.at_level(logging.INFO, logger="srepa_ds"):
        prepare(config_for(output))
    assert caplog.text.count("already prepared with these settings") == 2
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}


def test_a_missing_part_is_written_again(tmp_path):
    settings = {"holdout_fraction": 0.9, "image_size": 2}
    prepare(config_for(tmp_path, **settings))
    for path in (tmp_path / "heldout").iterdir():
        path.unlink()
    parts = prepare(config_for(tmp_path, **settings))
    assert len(parts["train"]) + len(parts["heldout"]) == 1797


def test_other_settings_do_not_overwrite(prepared):
    output, _ = prepared
    with pytest.raises(OutputError, match="seed is 0 there and 1 here"):
        prepare(config_for(output, seed=1))


def test_a_conflict_in_one_part_leaves_the_other_unwritten(tmp_path):
    (tmp_path / "heldout").mkdir()
    (tmp_path / "heldout" / "index.json").write_text("{}")
    with pytest.raises(DataError, match="expected an index of format"):
        prepare(config_for(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["heldout"]


def test_output_that_cannot_be_written_to_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*; choose a folder"):
        prepare(config_for(tmp_path / "file" / "digits"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nothing_is_held_out_on_request(tmp_path):
    parts = prepare(config_for(tmp_path, holdout_fraction=0.0, image_size=2))
    assert {name: len(part) for name, part in parts.items()} == {"train": 1797}
    assert not (tmp_path / "heldout").exists()


def test_a_fraction_that_empties_a_part_is_an_error(tmp_path):
    with pytest.raises(DataError, match="leaves no image for heldout"):
        prepare(config_for(tmp_path / "new", holdout_fraction=0.001))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("size", [8193, 10_000_000, 10**30])
def test_images_larger_than_any_are_refused(tmp_path, size):
    with pytest.raises(ConfigError, match="image_size: Input should be less than or equal to 8192"):
        config_for(tmp_path, image_size=size)


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_has_64_bits(tmp_path, seed):
    with pytest.raises(ConfigError, match=r"seed: Input should be (less|greater) than"):
        config_for(tmp_path, seed=seed)


def test_a_shard_that_no_memory_holds_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    memory = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 20}
    monkeypatch.setattr(os, "sysconf", memory.__getitem__)
    with pytest.raises(ConfigError, match=r"samples_per_shard: a shard of 500 images of 2000 px"):
        prepare(config_for(tmp_path / "new", image_size=2000))
    with pytest.raises(
        ConfigError, match=r"takes 7.2 GB of memory, and this .* 4.3 GB; set it to at most 149"
    ):
        prepare(config_for(tmp_path / "new", image_size=2000))
    memory["SC_PHYS_PAGES"] = 1 << 10
    with pytest.raises(ConfigError, match="choose a smaller image_size"):
        prepare(config_for(tmp_path / "new", image_size=2000))
    assert not (tmp_path / "new").exists()


def test_an_image_that_cannot_be_converted_is_named(tmp_path, monkeypatch):
    class Odd(Digits):
        def item(self, index):
            item = super().item(index)
            return replace(item, image=item.image.convert("F")) if index == 5 else item

    monkeypatch.setattr(DigitsConfig, "opened", lambda self: Odd())
    with pytest.raises(DataError, match="digit-0005: an image of mode F"):
        prepare(config_for(tmp_path / "new", image_size=2, holdout_fraction=0.0))
    assert not (tmp_path / "new").exists()


def test_killed_before_its_last_moment_it_is_tidied_up(tmp_path):
    config = config_for(tmp_path, holdout_fraction=0.0, image_size=2)
    prepare(config)
    undisturbed = contents(tmp_path)
    (tmp_path / "train" / MARKER_NAME).write_text("{}")
    prepare(config)
    assert contents(tmp_path) == undisturbed


def test_killed_in_its_first_moment_it_goes_on(tmp_path):
    config = config_for(tmp_path, holdout_fraction=0.0, image_size=2)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / f"{MARKER_NAME}.partial").write_text("")
    assert len(prepare(config)["train"]) == 1797


def test_faults_of_the_config_come_together():
    tree = {"kind": "prepare", "source": {"kind": "digit"}, "image_size": 0, "outptu": "x"}
    with pytest.raises(ConfigError) as caught:
        validated(PrepareConfig, tree, source="test")
    text = str(caught.value)
    assert "did you mean 'digits'?" in text
    assert "image_size" in text
    assert "did you mean 'output'?" in text
    assert "output: is required" in text


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5])
def test_split_is_stratified_disjoint_and_fixed(fraction):
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 4)[torch.arange(64) * 37 % 64]
    split = stratified_split(labels, holdout_fraction=fraction, seed=3)
    both = torch.cat([split.train, split.heldout])
    assert torch.equal(both.sort().values, torch.arange(64))
    counts = labels[split.heldout].bincount(minlength=3).tolist()
    assert counts == [round(40 * fraction), round(20 * fraction), round(4 * fraction)]
    again = stratified_split(labels, holdout_fraction=fraction, seed=3)
    assert torch.equal(split.heldout, again.heldout)
    if fraction:
        other = stratified_split(labels, holdout_fraction=fraction, seed=4)
        assert not torch.equal(split.heldout, other.heldout)


def test_the_digits_are_consistent():
    source = DigitsConfig(kind="digits").opened()
    assert isinstance(source, Source)
    assert source.labels.max() < len(source.class_names)
    assert len({source.key(index) for index in range(len(source.labels))}) == 1797
    assert min(source.item(1796).image.size) > 0
