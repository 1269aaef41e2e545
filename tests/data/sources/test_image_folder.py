import logging
import os

import numpy as np
import pytest
import small_trees
from messy_images import CLASS_IDS, EMPTY_CLASS
from small_trees import IMAGES, as_pil_reads, keys_of
from torchvision.datasets import ImageFolder as TorchvisionFolder

from srepa_ds.data.decoding import decoded
from srepa_ds.data.images import center_crop
from srepa_ds.data.sources.image_folder import ImageFolder
from srepa_ds.data.sources.listing import readable_names
from srepa_ds.errors import DataError


@pytest.fixture(scope="module")
def messy(messy_tree):
    return ImageFolder(messy_tree.root)


def test_the_messy_tree_is_listed_without_its_litter(messy_tree, messy):
    keys = keys_of(messy)
    assert keys == sorted({**messy_tree.sound, **messy_tree.broken})
    assert messy.class_ids == messy.class_names == CLASS_IDS
    labels = dict(zip(keys, messy.labels.tolist(), strict=True))
    assert {key: labels[key] for key in messy_tree.sound} == messy_tree.sound
    assert len(messy_tree.sound) >= 2900
    assert len(messy_tree.broken) == 40


def test_sound_images_are_read_and_broken_ones_refused(messy_tree, messy):
    refused = {}
    for index, key in enumerate(keys_of(messy)):
        try:
            assert center_crop(decoded(messy.item(index).image), 16).shape == (16, 16, 3)
        except DataError as error:
            refused[key] = str(error)
    kinds = {key: messy_tree.broken.get(key, "sound") for key in refused}
    assert kinds == messy_tree.broken
    reasons = {kind: refused[key] for key, kind in kinds.items()}
    assert "65500 x 65500 pixels" in reasons["a bomb of JPEG"]
    assert "link out of the folder" in reasons["a link out of the tree"]
    assert "No such file" in reasons["a link to nowhere"]
    assert "truncated" in reasons["half a JPEG"]
    assert "none of JPEG, PNG" in reasons["PostScript"]


def test_an_empty_class_is_mentioned_and_keeps_its_label(messy_tree, caplog):
    with caplog.at_level(logging.INFO, logger="srepa_ds"):
        source = ImageFolder(messy_tree.root)
    assert CLASS_IDS.index(EMPTY_CLASS) not in source.labels.unique().tolist()
    assert f"{EMPTY_CLASS} has no images" in caplog.text
    assert "images beside the folders of classes are left out (1)" in caplog.text


def test_labels_are_torchvisions(tmp_path):
    root = small_trees.write_tree(tmp_path / "tree")
    for name in ("Zebra", "ant", "B", "b c", "é", "10", "9", "ant-eater", "a.b"):
        (root / name / "deep").mkdir(parents=True)
        (root / name / "deep" / "x.JPG").write_bytes(next(iter(IMAGES.values())))
    (root / "ant" / "notes.txt").write_text("none")
    theirs = TorchvisionFolder(str(root))
    mine = ImageFolder(root)
    labels = {os.path.relpath(path, root): label for path, label in theirs.samples}
    assert dict(zip(keys_of(mine), mine.labels.tolist(), strict=True)) == labels
    assert list(mine.class_ids) == theirs.classes


def test_the_same_whatever_its_place_and_read_only(tmp_path):
    roots = [small_trees.write_tree(tmp_path / name) for name in ("a", "b")]
    for folder, _, _ in os.walk(roots[1]):
        os.chmod(folder, 0o555)
    try:
        here, there = map(ImageFolder, roots)
        assert here.fingerprint == there.fingerprint
    finally:
        for folder, _, _ in os.walk(roots[1]):
            os.chmod(folder, 0o755)
    (roots[1] / "n01440764x").mkdir()
    assert ImageFolder(roots[1]).fingerprint != here.fingerprint


def link_to_a_parent(root):
    (root / "n01440764" / "back").symlink_to("..")


def link_to_itself(root):
    (root / "n01440764" / "here").symlink_to(".")


def links_to_each_other(root):
    (root / "n01440764" / "there").symlink_to("../n01443537")
    (root / "n01443537" / "back").symlink_to("../n01440764")


def link_of_a_class_to_the_root(root):
    (root / "zzz").symlink_to(".")


@pytest.mark.parametrize(
    "link", [link_to_a_parent, link_to_itself, links_to_each_other, link_of_a_class_to_the_root]
)
@pytest.mark.parametrize("follow_links", [False, True])
def test_circles_of_links_are_refused(link, follow_links, tmp_path):
    root = small_trees.write_tree(tmp_path / "tree")
    link(root)
    with pytest.raises(DataError, match="is a link to a folder around it"):
        ImageFolder(root, follow_links=follow_links)


def test_links_out_are_followed_on_request(tmp_path):
    whole = small_trees.write_tree(tmp_path / "whole")
    some = tmp_path / "some"
    some.mkdir()
    (some / "n01443537").symlink_to(whole / "n01443537")
    (some / "n01440764").mkdir()
    name = min(IMAGES)
    (some / name).symlink_to(whole / name)
    with pytest.raises(
        DataError, match=r"n01443537 is a link out of the folder, to .*follow_links"
    ):
        ImageFolder(some)
    source = ImageFolder(some, follow_links=True)
    assert keys_of(source) == [key for key in sorted(IMAGES) if key == name or "443537" in key]
    assert np.array_equal(as_pil_reads(source.item(0).image), as_pil_reads(IMAGES[name]))


def test_a_link_to_a_sibling_is_followed(tmp_path):
    root = small_trees.write_tree(tmp_path / "tree")
    (root / "copy").symlink_to("n01440764")
    source = ImageFolder(root)
    assert len(source.labels) == len(IMAGES) + 5
    # A root that is a link itself changes nothing.
    (tmp_path / "link").symlink_to("tree")
    assert ImageFolder(tmp_path / "link").fingerprint == source.fingerprint


def test_pipes_and_lost_links_do_not_stop_it(tmp_path):
    root = small_trees.write_tree(tmp_path / "tree")
    os.mkfifo(root / "n01440764" / "pipe.jpg")
    (root / "n01440764" / "to pipe.jpg").symlink_to("pipe.jpg")
    (root / "n01440764" / "loop.jpg").symlink_to("loop.jpg")
    (root / "loop").symlink_to("loop")
    source = ImageFolder(root)
    assert set(keys_of(source)) - set(IMAGES) == {"n01440764/loop.jpg"}
    with pytest.raises(DataError, match="symbolic links"):
        source.item(keys_of(source).index("n01440764/loop.jpg"))


def test_a_name_that_is_not_utf_8_is_refused(tmp_path):
    root = small_trees.write_tree(tmp_path / "tree")
    with open(os.fsencode(root) + b"/n01440764/M\xfcnchen.jpg", "wb") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"M\\xfcnchen.jpg' is not UTF-8; rename"):
        ImageFolder(root)


def test_folders_without_images(tmp_path):
    with pytest.raises(DataError, match="no folder of images"):
        ImageFolder(tmp_path)
    (tmp_path / "class").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        ImageFolder(tmp_path)
    with pytest.raises(DataError, match="nowhere: No such file"):
        ImageFolder(tmp_path / "nowhere")


def test_an_image_that_vanishes_is_an_error_of_its_own(tmp_path):
    root = small_trees.write_tree(tmp_path / "tree")
    source = ImageFolder(root)
    (root / source.key(2)).unlink()
    with pytest.raises(DataError, match="No such file"):
        source.item(2)


def test_readable_names_are_imagenets_and_differ():
    from timm.data import ImageNetInfo

    ids = tuple(ImageNetInfo("imagenet-1k").label_names())
    names = readable_names(ids)
    assert len(set(names)) == len(ids) == 1000
    assert names[0] == "tench, Tinca tinca"
    assert {name for name in names if name.startswith("crane")} == {
        "crane (n02012849)", "crane (n03126707)",
    }  # fmt: skip
    assert readable_names((*ids, "n00000001"))[0] == "n01440764"
    assert readable_names(()) == ()
