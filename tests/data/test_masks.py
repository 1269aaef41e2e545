import numpy as np
import pytest
import torch
from PIL import Image

from srepa_ds.data.masks import find_mask, has_both_regions, read_mask
from srepa_ds.errors import DataError


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)
    return path


def test_any_foreground_in_a_patch_counts(tmp_path):
    values = np.zeros((256, 256))
    values[17, 40] = 1
    values[160:176, 240:256] = 255
    found = read_mask(write(tmp_path / "a.png", values), (16, 16)).reshape(16, 16)
    assert found.nonzero().tolist() == [[1, 2], [10, 15]]


def test_masks_of_any_size_fit_any_grid(tmp_path):
    values = np.zeros((64, 128))
    values[:, 64:] = 7
    found = read_mask(write(tmp_path / "a.png", values), (4, 8)).reshape(4, 8)
    # The resize of Pillow blends a little across the edge, so the middle is left open.
    assert not found[:, :3].any()
    assert found[:, 4:].all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
def test_all_modes_of_one_channel_are_masks(tmp_path, mode):
    picture = Image.new(mode, (32, 32), 0)
    picture.paste(1, (0, 0, 32, 16))
    picture.save(tmp_path / "a.png")
    found = read_mask(tmp_path / "a.png", (4, 4)).reshape(4, 4)
    assert found[:2].all()
    assert not found[3].any()


def test_files_that_are_no_masks_are_named(tmp_path):
    with pytest.raises(DataError, match=r"a.png: is a RGB picture"):
        read_mask(write(tmp_path / "a.png", np.zeros((8, 8, 3))), (2, 2))
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"b.png: cannot be read"):
        read_mask(tmp_path / "b.png", (2, 2))
    whole = write(tmp_path / "c.png", np.random.default_rng(0).integers(0, 255, (64, 64)))
    whole.write_bytes(whole.read_bytes()[:500])
    with pytest.raises(DataError, match=r"c.png: cannot be read"):
        read_mask(whole, (2, 2))


def test_masks_go_by_key_or_by_index_and_stay_inside_the_folder(tmp_path):
    masks = tmp_path / "masks"
    of_key = write(masks / "n01" / "a.png", np.zeros((4, 4)))
    of_index = write(masks / "7.png", np.zeros((4, 4)))
    outside = write(tmp_path / "secret.png", np.zeros((4, 4)))
    assert find_mask(masks, key="n01/a.JPEG", index=3) == of_key
    assert find_mask(masks, key="n01/b.JPEG", index=7) == of_index
    assert find_mask(masks, key="n01/b.JPEG", index=8) is None
    assert find_mask(masks, key="../secret.JPEG", index=8) is None
    assert find_mask(masks, key=str(outside), index=8) is None
    with pytest.raises(DataError, match="no such folder of masks"):
        find_mask(tmp_path / "nowhere", key="a", index=0)


def test_both_regions_need_a_quarter_of_the_tokens():
    counts = torch.tensor([63, 64, 192, 193])
    masks = torch.arange(256) < counts[:, None]
    assert has_both_regions(masks).tolist() == [False, True, True, False]
