"""Latents that a source holds, and those of images that are not stored."""

import json
import logging

import numpy as np
import pytest
import torch
from builders import contents
from foreign_data import SIZE, picture, png, write_lightningdit, write_parquet, write_repa
from PIL import Image
from ranks import run_function
from small_vae import opened, write_vae

from srepa_ds.codec.config import CodecConfig
from srepa_ds.codec.table import build_codec
from srepa_ds.commands.prepare import prepare
from srepa_ds.data.latent_file import latent_name
from srepa_ds.data.shard_file import shard_name
from srepa_ds.data.shards import ShardDataset
from srepa_ds.errors import ConfigError, DataError, OutputError
from srepa_ds.preparation.agreement import difference
from srepa_ds.preparation.config import PrepareConfig
from srepa_ds.preparation.encoder import Encoder
from srepa_ds.schema import validated

pytest.importorskip("diffusers")

STORED = {"codec": {"kind": "stored"}, "dtype": "fp32"}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("other"), seed=1)


def encoded_by(vae, **settings):
    """Returns a function that gives the moments of an image as REPA stores them."""
    codec = opened(vae, **settings)

    def moments(pixels):
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        return codec.moments(image)[0].numpy()

    return moments


@pytest.fixture(scope="module")
def repa(vae, tmp_path_factory):
    return write_repa(tmp_path_factory.mktemp("repa"), 10, encoded_by(vae))


def by(vae, **settings):
    return {"codec": {"kind": "vae", "weights": str(vae), **settings}, "dtype": "fp32"}


def run(output, source, **changes):
    tree = {"kind": "prepare", "source": source, "image_size": SIZE, "output": str(output)}
    tree |= {"samples_per_shard": 4, "pixels": "png", "threads": 2, **changes}
    return prepare(validated(PrepareConfig, tree, source="test"))


def from_repa(output, folder, **changes):
    return run(output, {"kind": "repa", "path": str(folder)}, **changes)["train"]


def from_lightningdit(output, folder, **changes):
    source = {"kind": "lightningdit", "path": str(folder)}
    return run(output, source, **{"pixels": None, **changes})["train"]


def everything(dataset):
    return dataset.read(torch.arange(len(dataset)))


def test_repas_folder_is_converted_without_encoding(repa, vae, tmp_path):
    dataset = from_repa(tmp_path, repa, latents=by(vae))
    batch = everything(dataset)
    moments = encoded_by(vae)
    for index in range(10):
        assert np.array_equal(batch.images[index].permute(1, 2, 0).numpy(), picture(index))
        assert np.array_equal(batch.moments[index].numpy(), moments(picture(index)))
    assert batch.labels.tolist() == [number % 3 for number in range(10)]
    assert dataset.keys(torch.tensor([4, 5])) == ["00000004", "00001000"]
    assert dataset.latents.codec == opened(vae).identity
    dataset.verify()
    assert not list(tmp_path.rglob("latents-*.json"))


def test_a_held_out_part_has_its_own_latents(repa, tmp_path):
    source = {"kind": "repa", "path": str(repa)}
    parts = run(tmp_path, source, latents=STORED, holdout_fraction=0.3)
    assert {name: len(part) for name, part in parts.items()} == {"train": 7, "heldout": 3}
    for part in parts.values():
        batch = everything(part)
        for number, key in enumerate(part.keys(batch.sample_ids)):
            name = f"vae-sd/{key[:5]}/img-mean-std-{key}.npy"
            assert np.array_equal(batch.moments[number].numpy(), np.load(repa / name))


def test_latents_of_an_unknown_codec_are_described_as_the_source_does(repa, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="srepa_ds"):
        dataset = from_repa(tmp_path, repa, latents=STORED)
    assert dataset.latents.codec == {"origin": "repa", "scale": 0.18215, "shift": 0.0}
    assert "codec:\n  kind: stored\n  scale: 0.18215\n  shift: 0.0" in caplog.text


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_of_storage_and_encoding_does_not_matter(tmp_path, vae, dtype, precision):
    moments = encoded_by(vae, precision="bf16")

    def stored(pixels):
        return moments(pixels).astype(np.float16).astype(np.float32)

    folder = write_repa(tmp_path / "repa", 4, stored)
    latents = {**by(vae, precision=precision), "dtype": dtype}
    assert len(from_repa(tmp_path / "out", folder, latents=latents)) == 4


def test_another_vae_is_refused_before_anything_is_written(repa, other_vae, tmp_path):
    with pytest.raises(DataError, match=r"latents.codec: is not the codec .*00000000 to .*differ"):
        from_repa(tmp_path / "out", repa, latents=by(other_vae))
    assert not (tmp_path / "out").exists()


def test_latents_of_other_images_are_refused(repa, vae, tmp_path):
    shifted = write_repa(tmp_path / "repa", 4, lambda pixels: encoded_by(vae)(pixels[::-1].copy()))
    with pytest.raises(DataError, match="means differ by"):
        from_repa(tmp_path / "out", shifted, latents=by(vae))


def test_differences_of_draws_are_measured_by_their_deviations(vae, other_vae):
    images = torch.stack([torch.from_numpy(picture(n)).permute(2, 0, 1) for n in range(8)])
    moments = opened(vae).moments(images)
    mean, std = moments.chunk(2, dim=1)
    generator = torch.Generator().manual_seed(0)
    narrow = torch.cat((mean, std * 1e-3), dim=1)
    draws = mean + std * 1e-3 * torch.randn(mean.shape, generator=generator)
    assert difference(draws, narrow, "samples") is None
    other = opened(other_vae).moments(images)
    assert "means differ" in difference(draws, other * torch.tensor(1e-3), "samples")
    log_variances = torch.cat((mean, 2 * (1e-3 * std).log()), dim=1)
    assert "standard deviations differ" in difference(log_variances, narrow, "moments")
    assert "differ by nan" in difference(torch.full_like(moments, torch.nan), moments, "moments")


def test_latents_of_another_size_are_refused(repa, vae, tmp_path):
    with pytest.raises(DataError, match=r"latents of shape \(4, 4, 4\), but .* \(4, 8, 8\)"):
        from_repa(tmp_path / "out", repa, latents=by(vae), image_size=32)


def test_without_images_nothing_is_compared_and_that_is_said(tmp_path, other_vae, vae, caplog):
    folder = write_repa(tmp_path / "repa", 3, encoded_by(vae), images=False)
    with caplog.at_level(logging.INFO, logger="srepa_ds"):
        dataset = from_repa(tmp_path / "out", folder, pixels=None, latents=by(other_vae))
    assert "latents.codec: not compared" in caplog.text
    assert everything(dataset).images is None
    assert np.array_equal(everything(dataset).moments[1].numpy(), encoded_by(vae)(picture(1)))


def test_latents_of_lightningdit_train_as_they_do_there(tmp_path, caplog):
    folder = write_lightningdit(tmp_path / "latents")
    with caplog.at_level(logging.INFO, logger="srepa_ds"):
        dataset = from_lightningdit(tmp_path / "out", folder)
    assert dataset.index.pixels is None
    assert dataset.latents.values == "samples"
    assert dataset.latents.mirrored
    assert dataset.index.class_names == tuple("01234")
    facts = json.loads((tmp_path / "out/train/index.json").read_text())["latents"]["codec"]
    config = {"kind": "stored", "scale": facts["scale"], "shift": facts["shift"]}
    assert f"scale: {facts['scale']}\n  shift: {facts['shift']}" in caplog.text
    codec = build_codec(validated(CodecConfig, config, source="test"))
    stats = torch.load(folder / "latents_stats.pt", weights_only=True)
    for mirrored in (False, True):
        turned = torch.full((len(dataset),), mirrored)
        batch = dataset.read(torch.arange(len(dataset)), mirrored=turned)
        expected = (batch.moments - stats["mean"]) / stats["std"]
        torch.testing.assert_close(codec.encode(batch, seed=0), expected)


def test_latents_keep_the_precision_they_come_in_unless_told_otherwise(tmp_path):
    folder = write_lightningdit(tmp_path / "latents")
    assert from_lightningdit(tmp_path / "a", folder).latents.dtype == "fp32"
    half = {**STORED, "dtype": "fp16"}
    assert from_lightningdit(tmp_path / "b", folder, latents=half).latents.dtype == "fp16"
    with pytest.raises(OutputError, match="dtype is 'fp32' there and 'fp16' here"):
        from_lightningdit(tmp_path / "a", folder, latents=half)


def faults(source, output, **changes):
    with pytest.raises(ConfigError) as caught:
        run(output, source, **changes)
    assert not output.exists()
    return [(fault.path, fault.message) for fault in caught.value.faults]


def test_what_a_source_does_not_hold_cannot_be_asked_for(repa, vae, tmp_path):
    out, digits = tmp_path / "out", {"kind": "digits"}
    here = {"kind": "lightningdit", "path": str(write_lightningdit(tmp_path / "latents"))}
    path, text = faults(here, out)[0]
    assert path == "pixels"
    assert "holds latents without images; set pixels: null" in text
    assert faults(digits, out, pixels=None)[0][0] == "pixels"
    assert faults(digits, out, latents=STORED)[0][0] == "latents.codec.kind"
    assert (
        faults(digits, out, latents={"codec": {"kind": "identity"}})[0][0] == "latents.codec.kind"
    )
    mirrored = {**by(vae), "mirrored": True}
    source = {"kind": "repa", "path": str(repa)}
    assert faults(source, out, latents=mirrored)[0][0] == "latents.mirrored"
    both = faults(here, out, latents={"codec": {"kind": "identity"}})
    assert [path for path, _ in both] == ["pixels", "latents.codec.kind"]


@pytest.fixture
def tree(tmp_path):
    """A folder of images of odd sizes, in which one cannot be read."""
    for number in range(11):
        path = tmp_path / "tree" / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number, 19 + number)).save(path)
    (tmp_path / "tree/class0/04.png").write_bytes(png(4)[:200])
    return {"kind": "image_folder", "path": str(tmp_path / "tree")}


@pytest.mark.parametrize("mirrored", [False, True])
def test_images_are_encoded_without_being_stored(tree, vae, tmp_path, mirrored):
    latents = {**by(vae), "batch_size": 3, "mirrored": mirrored}
    settings = {"latents": latents, "on_error": "skip"}
    both = run(tmp_path / "both", tree, **settings)["train"]
    alone = run(tmp_path / "alone", tree, pixels=None, **settings)["train"]
    assert alone.index.pixels is None
    assert len(alone) == len(both) == 10
    assert alone.index.num_skipped == 1
    assert alone.latents.codec == both.latents.codec
    for turned in (False, mirrored):
        wanted = torch.full((10,), turned)
        first, second = (part.read(torch.arange(10), mirrored=wanted) for part in (both, alone))
        # The same batches of the same pixels.
        assert torch.equal(first.moments, second.moments)
        assert torch.equal(first.labels, second.labels)
    assert both.keys(torch.arange(10)) == alone.keys(torch.arange(10))
    size = sum(path.stat().st_size for path in (tmp_path / "alone/train").glob("shard-*"))
    assert size < 4000


def test_an_image_that_cannot_be_read_ends_it_without_pixels_too(tree, vae, tmp_path):
    with pytest.raises(DataError, match=r"class0/04.png: cannot be decoded"):
        run(tmp_path / "out", tree, pixels=None, latents=by(vae))


def killed_after(monkeypatch, images):
    """Makes the preparation end as if by Ctrl-C after some images."""
    left = iter(range(images))
    add = Encoder.add

    def dying(self, image):
        if next(left, None) is None:
            raise KeyboardInterrupt
        add(self, image)

    monkeypatch.setattr(Encoder, "add", dying)


def test_killed_and_started_again_it_writes_the_same(tree, vae, tmp_path, monkeypatch):
    settings = {"latents": {**by(vae), "batch_size": 3}, "on_error": "skip", "pixels": None}
    run(tmp_path / "whole", tree, **settings)
    with monkeypatch.context() as patch:
        killed_after(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "again", tree, **settings)
    folder = tmp_path / "again" / "train"
    assert (folder / shard_name(0)).exists()
    assert not (folder / shard_name(1)).exists()
    before = (folder / latent_name(0)).stat().st_mtime_ns
    run(tmp_path / "again", tree, **settings)
    assert contents(folder) == contents(tmp_path / "whole" / "train")
    assert (folder / latent_name(0)).stat().st_mtime_ns == before


def test_latents_described_otherwise_are_made_again(tree, vae, tmp_path, monkeypatch):
    settings = {"on_error": "skip", "pixels": None}
    with monkeypatch.context() as patch:
        killed_after(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, tree, latents=by(vae), **settings)
    half = {**by(vae), "dtype": "fp16"}
    dataset = run(tmp_path, tree, latents=half, **settings)["train"]
    assert everything(dataset).moments.dtype == torch.float16
    assert isinstance(dataset, ShardDataset)


def test_parquet_files_become_shards(tmp_path, vae):
    pytest.importorskip("pyarrow")
    names = ("one", "two", "three")
    for number in range(2):
        name = f"data/train-0000{number}-of-00002.parquet"
        numbers = range(5 * number, 5 * number + 5)
        write_parquet(tmp_path / name, numbers, class_names=names, row_group_size=2)
    source = {"kind": "parquet", "path": str(tmp_path / "data"), "split": "train"}
    dataset = run(tmp_path / "out", source, latents=by(vae))["train"]
    batch = everything(dataset)
    for index in range(10):
        assert np.array_equal(batch.images[index].permute(1, 2, 0).numpy(), picture(index))
    assert dataset.index.class_names == names
    assert dataset.keys(torch.tensor([7])) == ["train-00001-of-00002.parquet:2"]
    torch.testing.assert_close(batch.moments, opened(vae).moments(batch.images))


def prepared_on_a_rank(tree):
    """Runs on each of several ranks."""
    return len(prepare(validated(PrepareConfig, tree, source="test"))["train"])


@pytest.mark.slow
def test_ranks_share_what_is_encoded_without_being_stored(tree, vae, tmp_path):
    settings = {"latents": {**by(vae), "batch_size": 3}, "on_error": "skip", "pixels": None}
    run(tmp_path / "one", tree, **settings)
    config = {"kind": "prepare", "source": tree, "image_size": SIZE, "threads": 1, **settings}
    config |= {"samples_per_shard": 4, "output": str(tmp_path / "two")}
    assert run_function(prepared_on_a_rank, 2, config) == [10, 10]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
