import io
import os
import re
import struct
import tarfile
import zipfile

import pytest
import small_trees
from messy_images import CLASS_IDS, EMPTY_CLASS
from small_trees import IMAGES, keys_of, tar_of

from srepa_ds.data.sources.archive import Archive
from srepa_ds.data.sources.image_folder import ImageFolder
from srepa_ds.errors import DataError

PHOTO = next(iter(IMAGES.values()))


def zip_of(path, *names, contents=PHOTO, **fields):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.writestr(info, contents)


def tar_with(path, name, kind=tarfile.REGTYPE, **fields):
    with tarfile.open(path, "w") as archive:
        good = tarfile.TarInfo("a/good.jpg")
        good.size = len(PHOTO)
        archive.addfile(good, io.BytesIO(PHOTO))
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, len(PHOTO) if kind == tarfile.REGTYPE else 0
        for field, value in fields.items():
            setattr(info, field, value)
        archive.addfile(info, io.BytesIO(PHOTO))


def changed(path, old, new, count=-1):
    contents = path.read_bytes()
    assert old in contents
    path.write_bytes(contents.replace(old, new, count))


def encrypted(path):
    zip_of(path, "a/x.jpg")
    contents = bytearray(path.read_bytes())
    contents[contents.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(contents)


def announcing(size):
    def arrange(path):
        zip_of(path, "a/x.jpg", contents=bytes(2000), compress_type=zipfile.ZIP_DEFLATED)
        changed(path, struct.pack("<I", 2000), struct.pack("<I", size))

    return arrange


def stored_larger(path):
    zip_of(path, "a/x.jpg", contents=bytes(2000))
    contents = bytearray(path.read_bytes())
    struct.pack_into("<I", contents, contents.index(b"PK\1\2") + 24, 9000)
    path.write_bytes(contents)


def overlapping(path):
    zip_of(path, "a/x.jpg", "a/y.jpg")
    contents = bytearray(path.read_bytes())
    second = contents.rindex(b"PK\1\2")
    struct.pack_into("<I", contents, second + 42, 0)
    path.write_bytes(contents)


def with_method(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a/x.jpg", PHOTO)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def twice(path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        zip_of(path, "a/x.jpg", "a/x.jpg")


HOSTILE_ZIPS = {
    "a parent": (lambda path: zip_of(path, "a/../../x.jpg"), "'a/../../x.jpg' leads out"),
    "an absolute path": (lambda path: zip_of(path, "/etc/x.jpg"), "'/etc/x.jpg' leads out"),
    "a drive": (lambda path: zip_of(path, "C:/x.jpg"), "'C:/x.jpg' is a path of another system"),
    "backslashes": (lambda path: zip_of(path, r"a\x.jpg"), "another system"),
    "a link": (
        lambda path: zip_of(path, "a/x.jpg", external_attr=0o120777 << 16), "'a/x.jpg' is a link",
    ),
    "an encrypted file": (encrypted, "'a/x.jpg' is encrypted"),
    "another method": (with_method, "'a/x.jpg' is compressed by method 14"),
    "a bomb": (announcing(900_000_000), "'a/x.jpg' announces 900,000,000 bytes from "),
    "a file that is stored larger": (
        stored_larger, "'a/x.jpg' announces 9,000 bytes from 2,000",
    ),
    "a larger bomb": (announcing(4_000_000_000), "'a/x.jpg' has 4,000,000,000 bytes"),
    "files over each other": (overlapping, "overlaps"),
    "a name given twice": (twice, "'a/x.jpg' more than once"),
}  # fmt: skip

HOSTILE_TARS = {
    "a parent": (lambda path: tar_with(path, "../x.jpg"), "'../x.jpg' leads out"),
    "an absolute path": (lambda path: tar_with(path, "/etc/x.jpg"), "'/etc/x.jpg' leads out"),
    "a symbolic link": (
        lambda path: tar_with(path, "a/x.jpg", tarfile.SYMTYPE, linkname="good.jpg"),
        "'a/x.jpg' is a link",
    ),
    "a hard link": (
        lambda path: tar_with(path, "a/x.jpg", tarfile.LNKTYPE, linkname="a/good.jpg"),
        "'a/x.jpg' is a link",
    ),
    "a device": (lambda path: tar_with(path, "a/x.jpg", tarfile.CHRTYPE), "neither a file nor"),
    "a pipe": (lambda path: tar_with(path, "a/x.jpg", tarfile.FIFOTYPE), "neither a file nor"),
    "a name given twice": (lambda path: tar_with(path, "./a/good.jpg"), "more than once"),
    "a name that is not UTF-8": (
        lambda path: tar_with(path, os.fsdecode(b"a/\xfc.jpg")), "is not UTF-8",
    ),
    "gzip": (lambda path: small_trees.write_tar(path, mode="w:gz"), "uncompress it first (`gunzip"),
    "xz": (lambda path: small_trees.write_tar(path, mode="w:xz"), "`unxz -k FILE`"),
    "a tar of gzipped tars": (
        lambda path: path.write_bytes(tar_of({"a.tar": tar_of({"x.jpg": PHOTO}, mode="w:gz")})),
        "a.tar: is compressed",
    ),
    "a hostile tar in a tar": (
        lambda path: path.write_bytes(tar_of({"a.tar": tar_of({"../x.jpg": PHOTO})})),
        "a.tar: the entry '../x.jpg' leads out",
    ),
    "nonsense": (lambda path: path.write_bytes(b"nonsense" * 200), "is not a readable tar"),
    "nothing": (lambda path: path.write_bytes(b""), "is not a readable tar"),
    "no images": (lambda path: path.write_bytes(tar_of({"a/x.txt": b"-"})), "holds no folder of"),
}  # fmt: skip

CASES = [("zip", name) for name in HOSTILE_ZIPS] + [("tar", name) for name in HOSTILE_TARS]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_hostile_archives_are_refused(kind, name, tmp_path):
    path = tmp_path / f"images.{kind}"
    arrange, words = (HOSTILE_ZIPS if kind == "zip" else HOSTILE_TARS)[name]
    arrange(path)
    with pytest.raises(DataError, match=re.escape(words)) as caught:
        Archive(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7])
@pytest.mark.parametrize("make", [
    small_trees.write_tar, small_trees.write_tar_of_tars, small_trees.write_zip,
])  # fmt: skip
def test_truncated_archives_are_refused_at_once(make, share, tmp_path):
    path = make(tmp_path / "archive")
    contents = path.read_bytes()
    path.write_bytes(contents[: int(len(contents) * share)])
    with pytest.raises(DataError, match="again"):
        Archive(path)


def test_a_damaged_header_ends_no_tar_silently(tmp_path):
    path = small_trees.write_tar(tmp_path / "images.tar")
    whole = Archive(path)
    contents = bytearray(path.read_bytes())
    place = max(entry.start for entry in whole._entries.values()) - 512
    contents[place] ^= 1
    path.write_bytes(contents)
    with pytest.raises(DataError, match=f"no header or end at byte {place:,}"):
        Archive(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_contents_of_a_zip_are_that_images_error(method, tmp_path):
    path = small_trees.write_zip(tmp_path / "images.zip", method=method)
    source = Archive(path)
    contents = bytearray(path.read_bytes())
    contents[source._entries[source.key(3)].start + 70] ^= 255
    path.write_bytes(contents)
    with pytest.raises(DataError, match="damaged"):
        source.item(3)
    assert source.item(4).image == IMAGES[source.key(4)]


def test_an_archive_that_shrinks_is_an_error(tmp_path):
    path = small_trees.write_tar(tmp_path / "images.tar")
    source = Archive(path)
    os.truncate(path, 2000)
    with pytest.raises(DataError, match="shorter than it was"):
        source.item(0)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        source.item(0)


def test_the_messy_tree_as_an_archive(messy_tree, tmp_path):
    folder = ImageFolder(messy_tree.root)
    kept = {key: index for index, key in enumerate(keys_of(folder))}
    kept = {key: index for key, index in kept.items() if not key.startswith("zebra/lo")
            and "out.jpg" not in key}  # fmt: skip
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in CLASS_IDS:
            archive.mkdir(f"images/{name}")
        for key in kept:
            archive.write(messy_tree.root / key, f"images/{key}")
        archive.write(messy_tree.root / "zebra" / "._0.jpg", "__MACOSX/images/zebra/._0.jpg")
        archive.write(messy_tree.root / "zebra" / "._0.jpg", "images/zebra/.hidden.jpg")
        archive.writestr("images/zebra/Thumbs.db", b"")
        archive.writestr("README.txt", b"")
    source = Archive(tmp_path / "a.zip")
    assert keys_of(source) == list(kept)
    assert source.class_ids == CLASS_IDS
    assert CLASS_IDS.index(EMPTY_CLASS) not in source.labels.tolist()
    for place in range(0, len(kept), 97):
        assert source.item(place).image == folder.item(kept[source.key(place)]).image


def test_a_tar_of_tars_with_litter_and_a_class_without_images(tmp_path):
    path = tmp_path / "train.tar"
    inner = {"b.tar": tar_of({"./1.jpg": PHOTO}), "a.tar": tar_of({}), "._b.tar": b"\0\5\x16\7"}
    path.write_bytes(tar_of(inner))
    source = Archive(path)
    assert (keys_of(source), source.class_ids) == (["b/1.jpg"], ("a", "b"))
    assert (source.labels.tolist(), source.item(0).image) == ([1], PHOTO)


def test_the_folder_of_the_classes(tmp_path):
    path = tmp_path / "images.tar"
    names = ("train/a/1.jpg", "train/b/1.jpg", "val/a/2.jpg", "val/b/2.jpg")
    path.write_bytes(tar_of(dict.fromkeys(names, PHOTO)))
    assert Archive(path).class_ids == ("train", "val")
    source = Archive(path, within="val")
    assert (source.class_ids, keys_of(source)) == (("a", "b"), ["a/2.jpg", "b/2.jpg"])
    with pytest.raises(DataError, match="holds no folder 'test'; it holds train, val"):
        Archive(path, within="test")
    path.write_bytes(tar_of({"cats/1.jpg": PHOTO, "cats/2.jpg": PHOTO}))
    assert Archive(path).class_ids == ("cats",)
    path.write_bytes(tar_of({"1.jpg": PHOTO}))
    with pytest.raises(DataError, match="each class needs a folder"):
        Archive(path)
    with pytest.raises(DataError, match=r"nowhere\.tar: No such file"):
        Archive(tmp_path / "nowhere.tar")
    with pytest.raises(DataError, match="Is a directory"):
        Archive(tmp_path)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar(form, tmp_path):
    name = f"class/{'long' * 24 if form == tarfile.USTAR_FORMAT else 'long' * 40}.jpg"
    path = tmp_path / "images.tar"
    path.write_bytes(tar_of({name: PHOTO, "class/x.jpg": PHOTO[:-1]}, form=form))
    source = Archive(path)
    assert keys_of(source) == [name, "class/x.jpg"]
    assert [source.item(index).image for index in (0, 1)] == [PHOTO, PHOTO[:-1]]


def test_a_tar_that_leads_back_to_an_earlier_place_ends(tmp_path):
    header = bytearray(tarfile.TarInfo("n01440764/a.png").tobuf())
    # A size of -512, in base 256, so that the next header would be this one again.
    header[124:136] = (-512).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "back.tar"
    path.write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(DataError, match=r"impossible header|not a readable tar"):
        Archive(path)
