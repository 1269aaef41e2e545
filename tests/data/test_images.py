import io

import numpy as np
import pytest
import torch
from PIL import Image
from places import GOLDEN as GOLDEN_FOLDER
from safetensors.torch import load_file

from srepa_ds.data.images import as_rgb, center_crop, image_grid
from srepa_ds.errors import DataError

GOLDEN = load_file(GOLDEN_FOLDER / "center_crop.safetensors")


@pytest.mark.parametrize("name", sorted(key for key in GOLDEN if ".crop" in key))
def test_equals_the_reference(name):
    case, size = name.split(".crop")
    image = Image.fromarray(GOLDEN[f"{case}.image"].numpy())
    assert np.array_equal(center_crop(image, int(size)), GOLDEN[name].numpy())


def test_large_image_of_the_contract():
    y, x = np.mgrid[0:601, 0:810]
    image = np.stack([(3 * x + y) % 256, (5 * y) % 256, (x * y // 7) % 256], axis=2)
    crop = center_crop(Image.fromarray(image.astype(np.uint8)), 256)
    assert crop.astype(np.int64).sum() == 25007571
    assert crop[0, 0].tolist() == [64, 4, 11]
    assert crop[255, 255].tolist() == [149, 181, 126]
    assert crop[100, 57].tolist() == [187, 152, 100]


@pytest.mark.parametrize("size", [1, 5, 16, 33])
@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (7, 90), (65, 33), (66, 66), (2, 3)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_any_shape_and_mode_gives_a_square_rgb_image(shape, size, mode):
    pixels = np.arange(shape[0] * shape[1] * 3).reshape(*shape, 3) % 251
    crop = center_crop(Image.fromarray(pixels.astype(np.uint8)).convert(mode), size)
    assert crop.shape == (size, size, 3)
    assert crop.dtype == np.uint8


@pytest.mark.parametrize("size", [16, 64])
def test_square_of_the_size_is_untouched(size):
    pixels = np.arange(size * size * 3).reshape(size, size, 3).astype(np.uint8)
    assert np.array_equal(center_crop(Image.fromarray(pixels), size), pixels)


RED, GREY = (200, 30, 10), (90, 90, 90)


def one_pixel(mode, value, **info):
    image = Image.new(mode, (1, 1), value)
    image.info.update(info)
    return image


def with_palette(mode, colour, **info):
    image = one_pixel("P", 3, **info)
    image.putpalette([0] * 9 + list(colour) + [0] * 9)
    return image if mode == "P" else image.convert("PA")


def clear_palette():
    image = with_palette("PA", RED)
    image.putalpha(0)
    return image


def sixteen_bits(mode, value):
    dtype = ">u2" if mode == "I;16B" else "<u2"
    return Image.frombytes(mode, (1, 1), np.array([value], dtype=dtype).tobytes())


MODES = {
    "1": (one_pixel("1", 1), (255, 255, 255)),
    "L": (one_pixel("L", 90), GREY),
    "L with a transparent grey": (one_pixel("L", 90, transparency=90), (255, 255, 255)),
    "L with another transparent grey": (one_pixel("L", 90, transparency=91), GREY),
    "LA opaque": (one_pixel("LA", (90, 255)), GREY),
    "LA half": (one_pixel("LA", (90, 51)), (222, 222, 222)),
    "LA clear": (one_pixel("LA", (90, 0)), (255, 255, 255)),
    "La half": (one_pixel("LA", (90, 51)).convert("La"), (222, 222, 222)),
    "P": (with_palette("P", RED), RED),
    "P with a transparent entry": (with_palette("P", RED, transparency=3), (255, 255, 255)),
    "P with another transparent entry": (with_palette("P", RED, transparency=2), RED),
    "P with alpha of entries": (
        with_palette("P", RED, transparency=bytes([255, 255, 255, 51])), (244, 210, 206)),
    "PA": (with_palette("PA", RED), RED),
    "PA clear": (clear_palette(), (255, 255, 255)),
    "RGB": (one_pixel("RGB", RED), RED),
    "RGB with a transparent colour": (one_pixel("RGB", RED, transparency=RED), (255, 255, 255)),
    "RGBX": (one_pixel("RGBX", (*RED, 7)), RED),
    "RGBA opaque": (one_pixel("RGBA", (*RED, 255)), RED),
    "RGBA half": (one_pixel("RGBA", (*RED, 51)), (244, 210, 206)),
    "RGBA clear": (one_pixel("RGBA", (*RED, 0)), (255, 255, 255)),
    "RGBa half": (one_pixel("RGBA", (*RED, 51)).convert("RGBa"), (244, 210, 206)),
    "CMYK": (one_pixel("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
    "YCbCr": (one_pixel("YCbCr", (90, 128, 128)), GREY),
    "LAB": (one_pixel("LAB", (255, 128, 128)), (255, 255, 255)),
    "HSV": (one_pixel("HSV", (0, 0, 90)), GREY),
    "I of 16 bits": (one_pixel("I", 90 * 257), GREY),
    "I white": (one_pixel("I", 65535), (255, 255, 255)),
    "I with a transparent grey": (one_pixel("I", 7, transparency=7), (255, 255, 255)),
    **{f"{mode} {name}": (sixteen_bits(mode, value), (grey,) * 3)
       for mode in ("I;16", "I;16B", "I;16L", "I;16N")
       for name, value, grey in [
           ("black", 0, 0), ("grey", 90 * 257, 90), ("white", 65535, 255),
           ("nearly black", 128, 0), ("less nearly black", 129, 1)]},
}  # fmt: skip


@pytest.mark.parametrize("name", MODES)
def test_every_mode_shows_what_a_viewer_shows_on_white(name):
    image, expected = MODES[name]
    found = as_rgb(image)
    assert (found.mode, found.size) == ("RGB", (1, 1))
    # Colour spaces round.
    assert np.abs(np.subtract(found.getpixel((0, 0)), expected)).max() <= 1
    assert center_crop(image, 4).shape == (4, 4, 3)


def test_every_mode_of_pillow_is_in_the_table():
    assert {*Image.MODES, "I;16B", "I;16L"} - {name.split()[0] for name in MODES} == {"F"}


def test_a_png_of_16_bits_keeps_its_brightness():
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, format="PNG")
    crop = center_crop(Image.open(file), 16)
    assert np.array_equal(crop[..., 0].flatten(), np.arange(256))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (one_pixel("F", 0.5), "mode F holds floating-point numbers"),
        (one_pixel("I", -1), "mode I holds numbers from -1 to -1"),
        (one_pixel("I", 65536), "mode I holds numbers from 65536 to 65536"),
    ],
)
def test_a_mode_without_a_known_range_is_refused(image, words):
    with pytest.raises(DataError, match=f"{words}.*convert it to 8 or 16 bits per channel"):
        center_crop(image, 4)


def test_an_opaque_image_is_cropped_as_by_adm_whatever_its_mode():
    for name in sorted(key for key in GOLDEN if ".crop" in key):
        case, size = name.split(".crop")
        image = Image.fromarray(GOLDEN[f"{case}.image"].numpy())
        if image.mode == "RGB":
            crop = center_crop(image.convert("RGBA"), int(size))
            assert np.array_equal(crop, GOLDEN[name].numpy())


def test_grid_holds_every_image_in_rows():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 4, 6) * 50
    grid = np.asarray(image_grid(images.contiguous(), columns=3, scale=2))
    assert grid.shape == (2 * (8 + 2) + 2, 3 * (12 + 2) + 2, 3)
    for number in range(5):
        row, column = divmod(number, 3)
        top, left = 2 + row * 10, 2 + column * 14
        assert (grid[top : top + 8, left : left + 12] == 50 * number).all()
    assert (grid[12:, 30:] == 255).all()


def test_grid_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        image_grid(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), columns=2)


def test_an_image_too_narrow_to_be_resized_is_refused_before_memory_is_taken():
    narrow = Image.new("RGB", (1, 65_500))
    with pytest.raises(DataError, match=r"is so narrow, 1 x 65500 pixels"):
        center_crop(narrow, 256)
