"""`srepa-ds verify` of data sets: classes, a decoded sample, latents, a contact sheet."""

import io
import json
import os
from hashlib import sha256

import numpy as np
import pytest
import torch
from builders import contents
from foreign_data import SIZE, picture, write_lightningdit, write_repa
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_vae import opened, write_vae

from srepa_ds.cli import run
from srepa_ds.commands.prepare import prepare
from srepa_ds.commands.verify import verify
from srepa_ds.data.index_document import INDEX_NAME
from srepa_ds.data.latent_file import latent_name
from srepa_ds.data.shard_file import shard_name
from srepa_ds.data.shard_index import DatasetDescription
from srepa_ds.data.shard_writer import ShardWriter
from srepa_ds.data.shards import ShardDataset
from srepa_ds.errors import DataError, OutputError
from srepa_ds.preparation.config import PrepareConfig
from srepa_ds.preparation.encoder import Encoder
from srepa_ds.preparation.inspection import MOST_READ, check_sample, spread
from srepa_ds.schema import validated

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of twelve images in three classes, the last of one image."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(12):
        path = folder / ("n03" if number == 11 else f"n0{number % 2}") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture(number)).save(path)
    return folder


def prepared(output, source, **changes):
    tree = {"kind": "prepare", "source": source, "image_size": SIZE, "output": str(output)}
    tree |= {"samples_per_shard": 5, "pixels": "png", **changes}
    prepare(validated(PrepareConfig, tree, source="test"))
    return output / "train"


def latents_of(vae, **changes):
    return {"codec": {"kind": "vae", "weights": str(vae)}, **changes}


@pytest.fixture
def data(tmp_path, images, vae):
    source = {"kind": "image_folder", "path": str(images)}
    return prepared(tmp_path / "data", source, latents=latents_of(vae, mirrored=True))


def test_data_with_latents_are_described(data, vae):
    before = contents(data)
    lines = verify(data, vae=vae).split("\n")
    # The folder may be read-only.
    assert contents(data) == before
    assert lines[0].startswith("7 files, ")
    assert lines[1:] == [
        "train: 12 samples, images stored as png (16 x 16 px)",
        "  12 decoded, some of each of 3 shards",
        "  latents 4 x 4 x 4, moments in fp16, also of mirrored images",
        "  12 compared with the VAE",
        "  3 classes of 1 to 6 samples, median 5",
    ]


def test_the_command_counts_each_class(data, capsys):
    assert run(["verify", str(data), "--classes"]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[-4:] == ["    0 n00: 6", "    1 n01: 5", "    2 n03: 1", ""]


def rehash(folder, name, kind="shards"):
    """Makes the index fit a file that was changed, as a faulty writer would."""
    tree = json.loads((folder / INDEX_NAME).read_text())
    entries = tree["shards"] if kind == "shards" else tree["latents"]["files"]
    content = (folder / name).read_bytes()
    for number, entry in enumerate(entries):
        if entry["file"] == name:
            entry |= {"bytes": len(content), "sha256": sha256(content).hexdigest()}
            if kind == "shards" and tree["latents"]:
                tree["latents"]["files"][number]["shard_sha256"] = entry["sha256"]
    (folder / INDEX_NAME).write_text(json.dumps(tree))


def changed(path, **tensors):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    found = load_file(path)
    change = {name: make(found[name]) for name, make in tensors.items()}
    save_file({**found, **change}, path, metadata=metadata)


def faults_of(folder, **options):
    with pytest.raises(DataError) as caught:
        verify(folder, **options)
    return str(caught.value)


def test_latents_are_hashed_too(data):
    path = data / latent_name(1)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (data / latent_name(2)).unlink()
    text = faults_of(data)
    assert ": 2 faults in 7 files" in text
    assert f"{latent_name(1)}: contents changed since it was written" in text
    assert f"{latent_name(2)}: missing, but the index names it" in text


def test_an_image_that_cannot_be_decoded_is_a_fault_whatever_its_hash(tmp_path, images):
    folder = prepared(tmp_path / "data", {"kind": "image_folder", "path": str(images)})
    changed(folder / shard_name(1), image_bytes=torch.zeros_like)
    rehash(folder, shard_name(1))
    assert "the image of sample 5 cannot be decoded" in faults_of(folder)


@pytest.mark.parametrize("name", ["moments", "moments_mirrored"])
@pytest.mark.parametrize(("row", "value"), [(0, torch.nan), (4, -1.0)])
def test_latents_that_cannot_be_are_a_fault_whatever_their_hash(data, name, row, value):
    def spoil(moments):
        moments[3, row] = value
        return moments

    changed(data / latent_name(1), **{name: spoil})
    rehash(data, latent_name(1), "latents")
    assert "the latents of sample(s) 8 are not finite, or their standard" in faults_of(data)


@pytest.mark.parametrize(
    ("name", "words"),
    [("moments", "its latents are not"), ("moments_mirrored", "its latents of mirrored images")],
)
def test_latents_of_other_images_are_a_fault(data, vae, name, words):
    for number in range(3):
        changed(data / latent_name(number), **{name: lambda moments: moments.roll(1, 0)})
        rehash(data, latent_name(number), "latents")
    verify(data)
    text = faults_of(data, vae=vae)
    assert words in text
    assert "means differ by" in text


def test_another_vae_is_a_fault(data, other_vae, tmp_path):
    assert "its latents are of the codec {'kind': 'vae'" in faults_of(data, vae=other_vae)
    with pytest.raises(DataError, match=r"nowhere: not a folder, and not the name of a repository"):
        verify(data, vae=tmp_path / "nowhere")


def test_latents_of_an_unknown_codec_are_compared_by_their_values(tmp_path, vae, other_vae):
    codec = opened(vae)

    def moments(pixels):
        return codec.moments(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0].numpy()

    source = {"kind": "repa", "path": str(write_repa(tmp_path / "repa", 6, moments))}
    stored = {"codec": {"kind": "stored"}}
    folder = prepared(tmp_path / "data", source, latents=stored)
    assert "6 compared with the VAE" in verify(folder, vae=vae)
    assert "are not those that the VAE makes of its images" in faults_of(folder, vae=other_vae)


def test_latents_of_another_shape_are_a_fault(tmp_path, vae):
    source = {"kind": "lightningdit", "path": str(write_lightningdit(tmp_path / "latents"))}
    folder = prepared(tmp_path / "data", source, pixels=None)
    assert "latents 32 x 2 x 2, samples in fp32" in verify(folder)
    assert "have the shape (32, 2, 2), but those of the VAE have" in faults_of(folder, vae=vae)


def test_options_need_something_to_work_on(data, vae, tmp_path):
    source = {"kind": "lightningdit", "path": str(write_lightningdit(tmp_path / "latents"))}
    without = prepared(tmp_path / "without", source, pixels=None)
    sheet = tmp_path / "sheet.png"
    assert "holds no images for a contact sheet" in faults_of(without, sheet=sheet)
    digits = prepared(tmp_path / "digits", {"kind": "digits"}, samples_per_shard=900)
    assert "holds no latents to compare; leave out --vae" in faults_of(digits, vae=vae)
    assert not sheet.exists()
    (data / INDEX_NAME).rename(data.parent / "manifest.json")
    assert "--vae and --sheet belong to data sets" in faults_of(data.parent, sheet=sheet)


def test_the_sheet_shows_images_class_by_class(data, tmp_path):
    sheet = tmp_path / "sheet.png"
    assert verify(data, sheet=sheet).endswith(f"contact sheet: {sheet}")
    scale, gap = 4, 2
    side = SIZE * scale + gap
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape == (side + gap, 16 * side + gap, 3)
    order = [*range(0, 11, 2), *range(1, 11, 2), 11]
    # In one class, images are in the order of their names: 0, 10, 2, ...
    order[:6] = sorted(order[:6], key=str)
    for place, number in enumerate(order):
        left = gap + place * side
        shown = pixels[gap : gap + SIZE * scale : scale, left : left + SIZE * scale : scale]
        assert np.array_equal(shown, picture(number)), place


def test_of_several_data_sets_each_has_a_sheet(tmp_path, images):
    source = {"kind": "image_folder", "path": str(images)}
    prepared(tmp_path / "data", source, holdout_fraction=0.3)
    text = verify(tmp_path / "data", sheet=tmp_path / "sheet.png")
    assert f"contact sheet: {tmp_path}/sheet-heldout.png" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "sheet-heldout.png",
        "sheet-train.png",
    }


def test_latents_without_images_are_decoded_for_the_sheet(tmp_path, images, vae):
    source = {"kind": "image_folder", "path": str(images)}
    folder = prepared(tmp_path / "data", source, pixels=None, latents=latents_of(vae))
    sheet = tmp_path / "sheet.png"
    text = verify(folder, vae=vae, sheet=sheet)
    assert "0 compared with the VAE, since there are no images; only the identity was" in text
    assert len(Image.open(sheet).getcolors(1 << 20)) > 100


def test_a_sheet_that_cannot_be_written_is_told(data, tmp_path):
    with pytest.raises(OutputError, match=r"nowhere/sheet.png: .*; choose another path with"):
        verify(data, sheet=tmp_path / "nowhere" / "sheet.png")


def test_large_images_are_shown_small(tmp_path):
    described = DatasetDescription({"kind": "test"}, (3, 300, 200), ("zero", "one", "two"))
    with ShardWriter(tmp_path / "data", description=described, samples_per_shard=9) as writer:
        writer.add(np.full((300, 200, 3), 77, dtype=np.uint8), 2)
    text = verify(tmp_path / "data", sheet=tmp_path / "sheet.png")
    assert "3 classes of 0 to 1 samples, median 0" in text
    assert "classes without samples: 0 zero, 1 one" in text
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (16 * (85 + 2) + 2, 128 + 4)
    assert sheet.getpixel((40, 60)) == (77, 77, 77)


def test_a_sample_is_spread_over_all_shards(tmp_path):
    assert spread(4, 100).tolist() == [0, 25, 50, 75]
    assert spread(4, 3).tolist() == [0, 1, 2]
    described = DatasetDescription({"kind": "test"}, (3, 1, 1), ("zero",))
    with ShardWriter(tmp_path, description=described, samples_per_shard=3) as writer:
        for _ in range(1000):
            writer.add(np.zeros((1, 1, 3), dtype=np.uint8), 0)
    dataset, read = ShardDataset(tmp_path), []
    plain = dataset.read
    dataset.read = lambda indices, **kwargs: read.extend(indices.tolist()) or plain(indices)
    assert check_sample(dataset) == len(read)
    assert len({index // 3 for index in read}) == 334
    assert MOST_READ <= len(read) < MOST_READ + 334


def killed_at(monkeypatch, image):
    count, add = iter(range(1000)), Encoder.add

    def dying(self, pixels):
        if next(count) == image:
            raise KeyboardInterrupt
        add(self, pixels)

    monkeypatch.setattr(Encoder, "add", dying)


def test_how_much_of_an_unfinished_data_set_is_written(tmp_path, images, vae, monkeypatch):
    killed_at(monkeypatch, 10)
    source = {"kind": "image_folder", "path": str(images)}
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "data", source, pixels=None, latents=latents_of(vae))
    text = faults_of(tmp_path / "data" / "train")
    assert "this is not a finished data set" in text
    assert "2 shards with 10 samples are written, latents of 2 of them: the same command" in text


def test_latents_that_are_not_finished_are_told(tmp_path, images, vae):
    source = {"kind": "image_folder", "path": str(images)}
    folder = prepared(tmp_path / "data", source)
    complete = prepared(tmp_path / "other", source, latents=latents_of(vae))
    index = json.loads((complete / INDEX_NAME).read_text())
    receipt = {key: value for key, value in index["latents"].items() if key != "files"}
    document = {"latents": index["latents"]["files"][0], "described": receipt}
    (folder / "latents-00000.json").write_text(json.dumps(document))
    assert "latents of 1 of 3 shards; their preparation is not finished" in verify(folder)


def test_images_that_were_left_out_are_counted(tmp_path, images):
    broken = tmp_path / "images" / "n00"
    broken.mkdir(parents=True)
    for number in range(3):
        picture_bytes = io.BytesIO()
        Image.fromarray(picture(number)).save(picture_bytes, format="PNG")
        content = picture_bytes.getvalue()
        (broken / f"{number}.png").write_bytes(content[:90] if number == 1 else content)
    source = {"kind": "image_folder", "path": str(broken.parent)}
    folder = prepared(tmp_path / "data", source, on_error="skip")
    assert "left out when it was prepared: 1 (skipped.jsonl)" in verify(folder)


def test_the_name_of_the_working_directory_is_shown(data, monkeypatch):
    monkeypatch.chdir(data)
    assert "\ntrain: 12 samples" in verify(type(data)(os.curdir))
