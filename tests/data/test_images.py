import numpy as np
import pytest
import torch
from PIL import Image
from places import GOLDEN as GOLDEN_FOLDER
from safetensors.torch import load_file

from srepa_ds.data.images import center_crop, image_grid

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
