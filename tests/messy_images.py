"""A folder of images as people have them: some 3,000, of every form, 40 of them broken.

Twenty folders of classes, one of them empty. It is the same each time.
"""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image

CLASS_IDS = (
    "2024", "A", "ALLCAPS", "B-52", "a", "b.c", "empty class", "great white shark", "n01440764",
    "n01443537", "nested", "tench, Tinca tinca", "white  spaces", "x.jpg", "zebra", "Ångström",
    "élan", "ñandú", "日本", "🦓",
)  # fmt: skip
"""Sorted as Python sorts them: the place of a name is its label."""
EMPTY_CLASS = "empty class"
_PER_CLASS = 155


@dataclass(frozen=True)
class MessyTree:
    """What `write_messy_tree` wrote. Keys are paths inside `root`."""

    root: Path
    sound: dict[str, int]
    """The label of each image that can be read."""
    broken: dict[str, str]
    """What is wrong with each of the others, in words."""
    class_ids: tuple[str, ...] = CLASS_IDS


@dataclass(frozen=True)
class _Form:
    """One form of image files."""

    name: str
    suffix: str
    file_format: str
    mode: str = "RGB"
    options: dict = field(default_factory=dict)
    change: Callable[[bytes], bytes] = lambda contents: contents


def _with_orientation() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _without_its_end(contents: bytes) -> bytes:
    return contents[:-5]


FORMS = (
    _Form("jpeg", ".jpg", "JPEG"),
    _Form("jpeg", ".JPEG", "JPEG", options={"quality": 95, "subsampling": 0}),
    _Form("progressive", ".jpg", "JPEG", options={"progressive": True}),
    _Form("grey", ".jpeg", "JPEG", "L"),
    _Form("cmyk", ".JPG", "JPEG", "CMYK"),
    _Form("turned", ".jpg", "JPEG", options={"exif": _with_orientation()}),
    _Form("cut short", ".jpg", "JPEG", change=_without_its_end),
    _Form("png", ".png", "PNG"),
    _Form("png named jpeg", ".JPEG", "PNG"),
    _Form("alpha", ".PNG", "PNG", "RGBA"),
    _Form("grey alpha", ".png", "PNG", "LA"),
    _Form("palette", ".png", "PNG", "P"),
    _Form("clear palette", ".png", "PNG", "P", {"transparency": 3}),
    _Form("one bit", ".png", "PNG", "1"),
    _Form("16 bits", ".png", "PNG", "I;16"),
    _Form("webp", ".webp", "WEBP", options={"method": 0}),
    _Form("webp alpha", ".WebP", "WEBP", "RGBA", {"lossless": True, "method": 0}),
    _Form("gif", ".gif", "GIF", "P"),
    _Form("bmp", ".bmp", "BMP"),
    _Form("tiff", ".tif", "TIFF"),
    _Form("tiff, 16 bits", ".tiff", "TIFF", "I;16", {"compression": "tiff_lzw"}),
    _Form("ppm", ".ppm", "PPM"),
    _Form("pgm", ".pgm", "PPM", "L"),
)
_SIZES = (
    (1, 1), (1, 40), (40, 1), (2, 3), (7, 5), (8, 8), (16, 16), (17, 31), (33, 20), (48, 36),
)  # fmt: skip
_LARGE = ((500, 375), (375, 500), (256, 256), (512, 1024), (2000, 3000))
_NAMES = ("{}", "with spaces {}", "übung {}", "{}.backup", "图 {}", "UPPER_{}", "a'b\"c;{}")


def image_of(size: tuple[int, int], mode: str, seed: int) -> Image.Image:
    """Returns a smooth image, width before height, that differs for each seed."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    across, down, level = (seed * 7) % 5 + 1, (seed * 11) % 5 + 1, (seed * 37) % 200
    pixels = np.stack([x * across + level, y * down + level, (x + y) * 2 + seed], axis=2) % 256
    image = Image.fromarray(pixels.astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray(((pixels[..., 0] * 257) % 65536).astype(np.uint16))
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(pixels[..., 1].astype(np.uint8)))
    return image.convert(mode)


def contents_of(form: _Form, size: tuple[int, int], seed: int) -> bytes:
    """Returns an image file."""
    return form.change(_saved(image_of(size, form.mode, seed), form.file_format, **form.options))


def _saved(image: Image.Image, file_format: str, **options: object) -> bytes:
    contents = io.BytesIO()
    image.save(contents, file_format, **options)
    return contents.getvalue()


def write_messy_tree(folder: Path) -> MessyTree:
    """Writes the tree as `folder/images`, and beside it what its links out lead to."""
    root = folder / "images"
    tree = MessyTree(root, {}, {})
    for name in CLASS_IDS:
        (root / name).mkdir(parents=True)
    for key, contents in _sound_files():
        _write(root / key, contents)
        tree.sound[key] = CLASS_IDS.index(key.split("/")[0])
    for (kind, contents), label in zip(_broken_files() * 2, cycle([0, 4, 10, 18]), strict=False):
        key = f"{CLASS_IDS[label]}/broken {len(tree.broken)}{_SUFFIXES.get(kind, '.jpg')}"
        _write(root / key, contents)
        tree.broken[key] = kind
    _link(tree, folder)
    _write_litter(root)
    return tree


def _sound_files() -> Iterator[tuple[str, bytes]]:
    seed = 0
    forms, names = cycle(FORMS), cycle(_NAMES)
    for name in CLASS_IDS:
        if name == EMPTY_CLASS:
            continue
        for number in range(_PER_CLASS):
            form, seed = next(forms), seed + 1
            size = _SIZES[seed % len(_SIZES)]
            # Five large images in all of the tree, in different forms.
            if number == 0 and seed // _PER_CLASS < len(_LARGE):
                size = _LARGE[seed // _PER_CLASS]
            if form.name == "cut short":
                # Of a smaller image the last five bytes are much.
                size = (160, 128)
            below = f"{number % 3}/deep {number % 2}/" if name == "nested" else ""
            key = f"{name}/{below}{next(names).format(number)}{form.suffix}"
            yield key, contents_of(form, size, seed)


def _write(path: Path, contents: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)


_SUFFIXES = {
    "half a PNG": ".png", "half a WebP": ".webp", "a bomb of PNG": ".png", "a bomb of GIF": ".gif",
    "floating point": ".tif", "SVG": ".png", "an animation of nothing": ".gif",
}  # fmt: skip


def _broken_files() -> list[tuple[str, bytes]]:
    """Returns each kind of broken file, and its contents."""
    photo = image_of((200, 160), "RGB", 5)
    jpeg, png = _saved(photo, "JPEG", quality=95), _saved(photo, "PNG")
    progressive = _saved(photo, "JPEG", quality=95, progressive=True)
    webp = _saved(photo, "WEBP")
    small_gif = _saved(image_of((1, 1), "P", 1), "GIF")
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    return [
        ("an empty file", b""),
        ("one byte", b"\xff"),
        ("text", b"not an image\n"),
        ("a page", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
        ("random bytes", np.random.default_rng(0).bytes(3000)),
        ("half a JPEG", jpeg[: len(jpeg) // 2]),
        ("half a progressive JPEG", progressive[: len(progressive) * 2 // 3]),
        ("the head of a JPEG", jpeg[:100]),
        ("half a PNG", png[: len(png) // 2]),
        ("half a WebP", webp[: len(webp) // 2]),
        ("a bomb of PNG", bomb_png(60_000, 60_000)),
        ("a bomb of JPEG", bomb_jpeg(jpeg)),
        ("a bomb of GIF", small_gif[:6] + b"\xff\xff\xff\xff" + small_gif[10:]),
        ("an animation of nothing", small_gif[:13]),
        ("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"),
        ("PDF", b"%PDF-1.4\n1 0 obj <<>> endobj\ntrailer <<>>\n%%EOF\n"),
        ("SVG", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
        ("a pickle", b"\x80\x04cposix\nsystem\n(S'true'\ntR."),
        ("floating point", _saved(Image.fromarray(values), "TIFF")),
    ]


def bomb_png(width: int, height: int) -> bytes:
    """Returns a small PNG that announces a size; its pixels end after the first bytes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        check = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(100_000))
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def bomb_jpeg(jpeg: bytes) -> bytes:
    """Returns `jpeg` with an announced size of 65,500 x 65,500."""
    place = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:place] + (65_500).to_bytes(2, "big") * 2 + jpeg[place + 4 :]


def _link(tree: MessyTree, folder: Path) -> None:
    """Adds links: two inside the tree, which are followed, and two that lead nowhere good."""
    outside = folder / "outside.jpg"
    outside.write_bytes(contents_of(FORMS[0], (8, 8), 1))
    root = tree.root
    (root / "zebra" / "link.jpg").symlink_to("../a/0.png")
    _write(root / "a" / "0.png", contents_of(FORMS[7], (8, 8), 2))
    tree.sound["a/0.png"] = CLASS_IDS.index("a")
    tree.sound["zebra/link.jpg"] = CLASS_IDS.index("zebra")
    (root / "nested" / "link").symlink_to("../A/sub")
    _write(root / "A" / "sub" / "1.png", contents_of(FORMS[7], (9, 9), 3))
    tree.sound["A/sub/1.png"] = CLASS_IDS.index("A")
    tree.sound["nested/link/1.png"] = CLASS_IDS.index("nested")
    (root / "zebra" / "out.jpg").symlink_to(outside)
    tree.broken["zebra/out.jpg"] = "a link out of the tree"
    (root / "zebra" / "lost.jpg").symlink_to("nowhere.jpg")
    tree.broken["zebra/lost.jpg"] = "a link to nowhere"


def _write_litter(root: Path) -> None:
    """Adds what lies about in folders of images and is not a sample."""
    photo = contents_of(FORMS[0], (8, 8), 9)
    _write(root / ".DS_Store", b"\0\0\0\1Bud1")
    _write(root / "README.txt", b"Photographs\n")
    _write(root / "beside the classes.jpg", photo)
    _write(root / ".hidden class" / "photo.jpg", photo)
    _write(root / "__MACOSX" / "zebra" / "._0.jpg", b"\0\5\x16\7")
    _write(root / "zebra" / "Thumbs.db", b"\xd0\xcf\x11\xe0")
    _write(root / "zebra" / ".hidden.jpg", photo)
    _write(root / "zebra" / "._0.jpg", b"\0\5\x16\7")
    _write(root / "zebra" / "notes.txt", b"stripes\n")
    _write(root / "zebra" / "labels.pkl", b"\x80\x04.")
    _write(root / "zebra" / "no ending", photo)
    (root / "zebra" / "empty below").mkdir()
