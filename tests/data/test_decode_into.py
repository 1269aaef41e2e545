"""Decodes stored images into a batch, exactly, and refuses damaged ones."""

import builtins
import subprocess
import sys

import numpy as np
import pytest
import torch
from latent_data import image
from PIL import Image
from skimage import data as photographs

from srepa_ds.data.images import center_crop
from srepa_ds.data.pixels import PIXEL_ENCODERS, decode_into

FORMS = tuple(PIXEL_ENCODERS)


def photograph(size=64):
    return center_crop(Image.fromarray(photographs.astronaut()), size)


IMAGES = {
    "a photograph": photograph(),
    "noise": image(3),
    "one colour": np.full((8, 5, 3), 7, np.uint8),
    "one pixel": np.array([[[1, 2, 3]]], np.uint8),
    "grey": np.repeat(image(1)[:, :, :1], 3, axis=2),
}


def stored(pixels, form):
    return torch.frombuffer(bytearray(PIXEL_ENCODERS[form](pixels)), dtype=torch.uint8)


def room_for(pixels):
    # A row of a batch, so that bytes beside it would be noticed.
    height, width, _ = pixels.shape
    return torch.full((3, 3, height, width), 99, dtype=torch.uint8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("has_torchvision", [True, False])
def test_pixels_come_back_exactly(monkeypatch, form, name, has_torchvision):
    if not has_torchvision:
        without_torchvision(monkeypatch)
    pixels = IMAGES[name]
    batch = room_for(pixels)
    decode_into(batch[1], stored(pixels, form), form)
    assert np.array_equal(batch[1].permute(1, 2, 0).numpy(), pixels)
    assert bool((batch[::2] == 99).all())


def without_torchvision(monkeypatch):
    whole = builtins.__import__

    def refuse(name, *arguments, **named):
        if name.startswith("torchvision"):
            raise ImportError(name)
        return whole(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep", [0, 7, 20, 0.5, 0.9])
def test_a_part_of_an_image_is_refused(form, keep):
    pixels = photograph()
    contents = stored(pixels, form)
    count = keep if isinstance(keep, int) else int(keep * len(contents))
    with pytest.raises((OSError, ValueError, SyntaxError)):
        decode_into(room_for(pixels)[1], contents[:count], form)


@pytest.mark.parametrize("form", FORMS)
def test_an_image_of_another_size_is_refused(form):
    with pytest.raises(ValueError, match=r"it has the shape \(3, 8, 5\)"):
        decode_into(
            torch.zeros(3, 5, 8, dtype=torch.uint8), stored(IMAGES["one colour"], form), form
        )


def test_another_format_is_refused():
    pixels = photograph()
    for form, other in (("png", "webp"), ("webp", "png")):
        with pytest.raises((OSError, ValueError)):
            decode_into(room_for(pixels)[1], stored(pixels, other), form)


DAMAGE = """
import torch, sys
from srepa_ds.data.pixels import decode_into
form, size = sys.argv[1], int(sys.argv[2])
whole = bytearray(sys.stdin.buffer.read())
room = torch.zeros(3, size, size, dtype=torch.uint8)
refused = 0
for place in range(0, len(whole), max(1, len(whole) // 60)):
    damaged = bytearray(whole)
    damaged[place] ^= 0x55
    try:
        decode_into(room, torch.frombuffer(damaged, dtype=torch.uint8), form)
    except (OSError, ValueError, SyntaxError):
        refused += 1
print(refused)
"""


@pytest.mark.parametrize("form", FORMS)
def test_damaged_bytes_never_end_the_process(form):
    contents = stored(photograph(), form).numpy().tobytes()
    command = [sys.executable, "-W", "ignore", "-c", DAMAGE, form, "64"]
    done = subprocess.run(command, input=contents, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) > 0
