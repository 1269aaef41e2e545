"""Image sets of every form: the same images, in the same order, whoever reads them."""

import numpy as np
import pytest
import torch
from builders import write_shards
from PIL import Image

from srepa_ds.data.shards import ShardDataset
from srepa_ds.errors import DataError
from srepa_ds.evaluation import file_images
from srepa_ds.evaluation.image_sets import FileImages, NpzImages, ShardImages, open_images
from srepa_ds.evaluation.images import WHOLE, ImageSet, Stripe
from srepa_ds.sampling.config import SamplerConfig
from srepa_ds.sampling.generate import ImageBatch, plan_chunks
from srepa_ds.sampling.outputs.table import OUTPUTS
from srepa_ds.sampling.provenance import Provenance
from srepa_ds.sampling.writer import ChunkWriter


@pytest.fixture
def shards(tmp_path):
    write_shards(tmp_path / "shards", num_samples=23)
    return tmp_path / "shards"


@pytest.fixture
def pixels(shards):
    """Returns the images of the shards (n, height, width, 3)."""
    dataset = ShardDataset(shards)
    return dataset.read(torch.arange(len(dataset))).pixels.permute(0, 2, 3, 1).contiguous().numpy()


@pytest.fixture
def archive(tmp_path, pixels):
    np.savez(tmp_path / "images.npz", pixels, np.arange(len(pixels)) % 4)
    return tmp_path / "images.npz"


@pytest.fixture
def files(tmp_path, pixels):
    (tmp_path / "files").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "files" / f"{number:06d}.png")
    return tmp_path / "files"


def read(images: ImageSet, size: int, stripe: Stripe = WHOLE) -> tuple[torch.Tensor, list[int]]:
    blocks = list(images.blocks(size, stripe))
    ids = [number for block in blocks for number in block.sample_ids.tolist()]
    return torch.cat([block.images for block in blocks]), ids


@pytest.mark.parametrize("size", [1, 5, 23, 50])
def test_every_form_gives_the_same_images(shards, archive, files, pixels, size):
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    for place, kind in ((shards, ShardImages), (archive, NpzImages), (files, FileImages)):
        images = open_images(place, setting="evaluate.samples")
        assert isinstance(images, kind)
        assert (len(images), images.image_shape) == (23, (3, 16, 16))
        found, ids = read(images, size)
        assert torch.equal(found, expected)
        assert ids == list(range(23))


@pytest.mark.parametrize("every", [2, 3, 7])
def test_ranks_share_the_blocks_of_a_set(shards, archive, files, every):
    for place in (shards, archive, files):
        images = open_images(place, setting="evaluate.samples")
        each = [read(images, 4, Stripe(first, every))[1] for first in range(min(every, 6))]
        assert sorted(number for ids in each for number in ids) == list(range(23))


def test_labels_are_those_of_the_archive(archive):
    blocks = list(NpzImages(archive).blocks(10))
    assert torch.cat([block.labels for block in blocks]).tolist() == [i % 4 for i in range(23)]


def test_a_sample_set_is_its_archive(tmp_path, archive):
    (tmp_path / "set").mkdir()
    archive.rename(tmp_path / "set" / "samples.npz")
    assert len(open_images(tmp_path / "set", setting="evaluate.samples")) == 23


@pytest.mark.parametrize("size", [1, 2, 7])
def test_chosen_images_of_every_form_are_numbered_from_zero(shards, archive, files, pixels, size):
    chosen = torch.tensor([2, 3, 9, 20])
    for place in (shards, archive, files):
        whole = open_images(place, setting="evaluate.reference")
        images = whole.chosen(chosen)
        found, ids = read(images, size)
        assert (len(images), ids) == (4, [0, 1, 2, 3])
        assert torch.equal(found, torch.from_numpy(pixels).permute(0, 3, 1, 2)[chosen])
        assert len({str(one.identity) for one in (whole, images, whole.chosen(chosen + 1))}) == 3
    second = (
        open_images(archive, setting="evaluate.reference").chosen(chosen).blocks(2, Stripe(1, 2))
    )
    assert [block.labels.tolist() for block in second] == [[9 % 4, 20 % 4]]


def write_set(folder, outputs, images, labels):
    """Writes a set as `sample` does."""
    chunks = plan_chunks(SamplerConfig(num_samples=len(images), batch_size=5))
    writer = ChunkWriter(folder, Provenance({"seed": 3}), outputs)
    for chunk in writer.missing(chunks):
        own = slice(chunk.start, chunk.stop)
        tensors = torch.from_numpy(images[own]), torch.from_numpy(labels[own])
        writer.write(ImageBatch(*tensors, chunk.sample_ids(), chunk))
    writer.assemble(chunks, num_classes=4)


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_set_is_read_in_every_form_that_sample_writes(tmp_path, pixels, output):
    labels = np.arange(len(pixels)) * 7 % 4
    write_set(tmp_path / "set", [output], pixels, labels)
    for place in (tmp_path / "set", tmp_path / "set" / OUTPUTS[output].name):
        blocks = list(open_images(place, setting="evaluate.samples").blocks(10))
        found = torch.cat([block.images for block in blocks])
        assert torch.equal(found, torch.from_numpy(pixels).permute(0, 3, 1, 2))
        assert torch.cat([block.labels for block in blocks]).tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [("1\n2\n", "it holds 2 labels for 23 images"), ("-1\n" * 23, "the label -1 is not from 0")],
)
def test_labels_beside_pictures_belong_to_them(tmp_path, pixels, text, message):
    write_set(tmp_path / "set", ["png"], pixels, np.zeros(len(pixels), dtype=np.int64))
    (tmp_path / "set" / "png" / "labels.txt").write_text(text)
    with pytest.raises(DataError, match=rf"evaluate\.samples: .*labels\.txt: {message}"):
        open_images(tmp_path / "set", setting="evaluate.samples")


def test_other_programs_labels_are_not_read(files):
    (files / "labels.txt").write_text("000000.png cat\n")
    (block,) = open_images(files, setting="evaluate.samples").blocks(30)
    assert block.labels is None


def test_other_images_of_the_same_names_and_sizes_are_another_set(archive, files, pixels):
    before = [open_images(one, setting="evaluate.reference").identity for one in (archive, files)]
    again = [open_images(one, setting="evaluate.reference").identity for one in (archive, files)]
    assert before == again
    sizes = archive.stat().st_size, (files / "000004.png").stat().st_size
    np.savez(archive, np.roll(pixels, 1, axis=0), np.arange(len(pixels)) % 4)
    content = (files / "000004.png").read_bytes()
    (files / "000004.png").write_bytes(content[:-30] + bytes(30))
    assert sizes == (archive.stat().st_size, (files / "000004.png").stat().st_size)
    after = [open_images(one, setting="evaluate.reference").identity for one in (archive, files)]
    assert all(
        one["contents"] != other["contents"] for one, other in zip(before, after, strict=True)
    )


def test_sizes_of_all_files_are_told_where_not_all_are_hashed(files, monkeypatch):
    monkeypatch.setattr(file_images, "MOST_HASHED", 2)
    before = FileImages(files).identity
    with (files / "000004.png").open("ab") as file:
        file.write(b"0")
    assert FileImages(files).identity != before


def images_of(**members):
    return lambda path: np.savez(path, **members)


PLAIN = np.zeros((4, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (images_of(images=PLAIN), "it holds images, and images should be in arr_0"),
        (images_of(arr_0=PLAIN[..., :1]), r"arr_0 is uint8 of shape \(4, 8, 8, 1\)"),
        (images_of(arr_0=np.full((4, 8, 8, 3), np.nan)), "arr_0 is float64"),
        (images_of(arr_0=PLAIN[:0]), "it holds no images"),
        (images_of(arr_0=PLAIN, arr_1=np.arange(3)), "3 labels for 4 images"),
        (images_of(arr_0=PLAIN, arr_1=np.array([0, 1, -1, 2])), "the label -1 is not from 0 to"),
        (images_of(arr_0=PLAIN, arr_1=np.array([0, 10**11, 1, 2])), "the label 100000000000 is"),
        (images_of(arr_0=np.array([{}])), "holds Python objects"),
        (lambda path: path.write_bytes(b"PK"), "not an .npz archive"),
    ],
)
def test_archives_of_something_else_are_refused(tmp_path, write, message):
    write(tmp_path / "a.npz")
    with pytest.raises(DataError, match=rf"evaluate\.samples: .*a\.npz: .*{message}"):
        open_images(tmp_path / "a.npz", setting="evaluate.samples")


def test_a_folder_of_mixed_sizes_is_refused(files):
    Image.new("RGB", (8, 16)).save(files / "000020.png")
    images = open_images(files, setting="evaluate.samples")
    with pytest.raises(DataError, match=r"000020\.png: has 16 x 8 pixels, and 000000\.png has 16"):
        list(images.blocks(5))


def test_a_broken_file_is_named(files):
    (files / "000007.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(DataError, match=r"000007\.png: cannot be decoded.*remove or replace it"):
        list(FileImages(files).blocks(5))


def test_what_is_not_there_or_not_finished(tmp_path):
    with pytest.raises(DataError, match=r"gone: no such file or folder.*`srepa-ds sample CONFIG`"):
        open_images(tmp_path / "gone", setting="evaluate.samples")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        open_images(tmp_path / "empty", setting="evaluate.samples")
    (tmp_path / "empty" / "provenance.json").write_text("{}")
    with pytest.raises(DataError, match="not finished; run `srepa-ds sample CONFIG` again"):
        open_images(tmp_path / "empty", setting="evaluate.samples")
