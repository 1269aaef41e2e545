import io
import warnings
from concurrent.futures import ThreadPoolExecutor

import messy_images
import numpy as np
import pytest
import skimage.data
from messy_images import FORMS, bomb_png, contents_of
from PIL import Image, ImageFile

from srepa_ds.data import decoding
from srepa_ds.data.decoding import decoded
from srepa_ds.errors import DataError

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


def photograph(name, size=(500, 375), mode="RGB"):
    return Image.fromarray(getattr(skimage.data, name)()).resize(size).convert(mode)


def saved(image, file_format="JPEG", **options):
    contents = io.BytesIO()
    image.save(contents, file_format, **options)
    return contents.getvalue()


def as_pil_reads(contents):
    with Image.open(io.BytesIO(contents)) as image:
        return np.asarray(image)


@pytest.mark.parametrize(
    "form",
    [form for form in FORMS if form.name != "cut short"],
    ids=lambda form: f"{form.name}{form.suffix}",
)
def test_pixels_and_mode_are_pils(form):
    for size in ((1, 1), (3, 40), (64, 48)):
        contents = contents_of(form, size, 5)
        image = decoded(contents)
        with Image.open(io.BytesIO(contents)) as expected:
            assert (image.mode, image.size) == (expected.mode, expected.size)
            assert image.has_transparency_data == expected.has_transparency_data
            assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_the_orientation_is_left_alone():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = photograph("coffee", (60, 40))
    assert np.array_equal(decoded(saved(image, exif=exif)), decoded(saved(image)))
    assert decoded(saved(image, exif=exif)).size == (60, 40)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1}, {"quality": 95}],
    ids=str,
)
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_jpeg_may_lack_a_few_bytes_but_not_half(name, options, mode):
    whole = photograph(name, mode=mode)
    contents = saved(whole, **options)
    expected = as_pil_reads(contents)
    for cut in (1, 2, 3, 4) if "progressive" in options else (1, 2, 3, 4, 20, 60):
        pixels = np.asarray(decoded(contents[:-cut]))
        assert pixels.shape == expected.shape
        assert np.array_equal(pixels[:-48], expected[:-48])
        assert (pixels != expected).mean() < 0.1
    for share in (0.05, 0.1, 0.3, 0.5, 0.6):
        with pytest.raises(DataError, match="truncated"):
            decoded(contents[: int(len(contents) * share)])


def test_only_the_end_marker_is_missing():
    contents = saved(photograph("astronaut"))
    assert np.array_equal(decoded(contents[:-2]), as_pil_reads(contents))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_bytes_before_a_marker_or_behind_the_end_are_no_fault():
    # Strict decoders refuse such files; ImageNet has some.
    contents = saved(photograph("astronaut"), restart_marker_rows=4)
    place = contents.index(b"\xff\xd2")
    extraneous = contents[:place] + b"\x12\x34" + contents[place:]
    assert np.array_equal(decoded(extraneous), as_pil_reads(contents))
    assert np.array_equal(decoded(contents + b"\0" * 100), as_pil_reads(contents))


def test_bombs_are_refused_before_memory_is_taken(monkeypatch):
    def no_loading(*_):
        raise AssertionError("memory is taken")

    photo = saved(photograph("coffee", (64, 64)))
    gif = saved(photograph("coffee", (8, 8), "P"), "GIF")
    bmp = saved(photograph("coffee", (8, 8)), "BMP")
    bombs = [
        bomb_png(60_000, 60_000),
        bomb_png(1 << 28, 2),
        messy_images.bomb_jpeg(photo),
        gif[:6] + b"\xff\xff\xff\xff" + gif[10:],
        bmp[:18] + (1 << 20).to_bytes(4, "little") * 2 + bmp[26:],
        b"P6 99999 99999 255 " + bytes(100),
    ]
    for cls in {cls for _, _, cls in decoding._READERS}:
        monkeypatch.setattr(cls, "load", no_loading)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bomb in bombs:
            with pytest.raises(DataError, match=r"has \d+ x \d+ pixels; at most 268,435,456"):
                decoded(bomb)


def test_a_large_photograph_passes_without_a_warning():
    # Beyond the 89 million pixels of which PIL warns.
    image = Image.new("1", (10_000, 9_500), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoded(saved(image, "PNG")).size == (10_000, 9_500)


def test_the_first_image_of_an_animation():
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "lime", "blue")]
    for file_format in ("GIF", "WEBP", "PNG", "TIFF"):
        contents = saved(frames[0], file_format, save_all=True, append_images=frames[1:])
        colour = decoded(contents).convert("RGB").getpixel((10, 10))
        assert max(abs(np.subtract(colour, (255, 0, 0)))) < 8, file_format


def test_damaged_exif_costs_neither_a_warning_nor_the_image():
    image = photograph("coffee", (40, 30))
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0"
    contents = saved(image, exif=exif)
    # Without the density in JFIF, PIL looks for one in EXIF.
    place = contents.index(b"JFIF")
    contents = contents[: place + 7] + b"\0\0\1\0\1" + contents[place + 12 :]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoded(contents).size == (40, 30)


FOREIGN = {
    "nothing": b"",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "PDF": b"%PDF-1.7\n",
    "SVG": b"<svg/>",
    "ICO": b"\0\0\1\0\1\0\x10\x10",
    "a pickle": b"\x80\x04.",
    "text": b"Pixels",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_formats_are_refused(name):
    with pytest.raises(DataError, match="cannot be decoded"):
        decoded(FOREIGN[name])


def test_whatever_is_damaged_is_a_data_error():
    random = np.random.default_rng(0)
    outcomes = []
    for number in range(1500):
        form = FORMS[number % len(FORMS)]
        if form.file_format == "TIFF":
            # libtiff prints on its own.
            continue
        contents = bytearray(contents_of(form, (20, 24), number % 7))
        for place in random.integers(0, len(contents), 3):
            contents[place] = random.integers(256)
        try:
            decoded(bytes(contents))
            outcomes.append(True)
        except DataError:
            outcomes.append(False)
    assert 0.1 < np.mean(outcomes) < 0.9


def test_threads_decode_alike():
    files = [saved(photograph(name, (120, 90)), quality=90) for name in PHOTOGRAPHS]
    files += [contents[:-3] for contents in files]
    expected = [np.asarray(decoded(contents)) for contents in files]
    with ThreadPoolExecutor(8) as pool:
        for number, image in enumerate(pool.map(decoded, files * 20)):
            assert np.array_equal(np.asarray(image), expected[number % len(files)])


def test_a_lack_of_memory_is_no_fault_of_the_image(monkeypatch):
    def lack(*_):
        raise MemoryError

    contents = saved(photograph("coffee"))
    monkeypatch.setattr(Image.Image, "load", lack)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lack)
    with pytest.raises(MemoryError):
        decoded(contents)
