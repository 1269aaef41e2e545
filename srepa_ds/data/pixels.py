"""Stores the pixels of one image without loss: `PIXEL_ENCODERS`, and what each costs.

Of four photographs of 256 px, on one core: raw takes 197 KB and no time to decode; PNG takes 57 %
of that and 1.9 ms, WebP 45 % and 1.1 ms (and 2 ms to encode, by libwebp's fastest setting; its best
saves another 6 % and takes 60 ms). PNG without compression, as REPA keeps it, takes 0.9 ms. Of
512 px: PNG 7.4 ms, WebP 4.1, PNG without compression 4.2.
"""

import io
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor

Pixels = UInt8[ndarray, "height width 3"]


def _png(pixels: Pixels) -> bytes:
    return _saved(pixels, "PNG", compress_level=1)


def _webp(pixels: Pixels) -> bytes:
    return _saved(pixels, "WEBP", lossless=True, quality=0, method=0)


def _saved(pixels: Pixels, form: str, **options: object) -> bytes:
    contents = io.BytesIO()
    Image.fromarray(pixels).save(contents, format=form, **options)
    return contents.getvalue()


PIXEL_ENCODERS: dict[str, Callable[[Pixels], bytes]] = {"png": _png, "webp": _webp}
"""For each storage but `raw`: the bytes of an image."""

BYTES_PER_VALUE = {"raw": 1.0, "png": 0.57, "webp": 0.45}
"""Bytes on disk per pixel and channel, measured on photographs; for estimates."""


def decode_into(
    room: UInt8[Tensor, "3 height width"], contents: UInt8[Tensor, " bytes"], form: str
) -> None:
    """Decodes the bytes of a `png` or `webp` file into `room`.

    Raises OSError or ValueError if they cannot be decoded or hold an image of another size.
    """
    pixels = _DECODERS[form](contents)
    if pixels.shape != room.shape or pixels.dtype != room.numpy().dtype:
        raise ValueError(f"it has the shape {pixels.shape}")
    # Half the time that torch takes to lay channels out one after another.
    np.copyto(room.numpy(), pixels)


def import_decoder(form: str) -> None:
    """Imports what `decode_into` needs for `form`."""
    if form == "webp":
        import torchvision.io  # noqa: F401


def _webp_pixels(contents: Tensor) -> ndarray:
    # 1.06 ms (256 px) and 3.9 ms (512 px), where Pillow needs 1.12 and 5.6.
    try:
        # Imported here because it takes a second.
        from torchvision.io import ImageReadMode, decode_webp

        return decode_webp(contents, ImageReadMode.RGB).numpy()
    except (ImportError, RuntimeError):
        # Pillow says what is wrong. Also, torchvision may have been built without WebP, and 0.29
        # announces that its decoders will go.
        return _pillow_pixels(contents, "WEBP")


def _png_pixels(contents: Tensor) -> ndarray:
    # By Pillow: a damaged byte ended the process in torchvision 0.29.1 (segmentation fault), which
    # is 0.2 ms faster.
    return _pillow_pixels(contents, "PNG")


def _pillow_pixels(contents: Tensor, form: str) -> ndarray:
    with Image.open(io.BytesIO(contents.numpy().data), formats=(form,)) as image:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        return np.asarray(rgb).transpose(2, 0, 1)


_DECODERS: dict[str, Callable[[Tensor], ndarray]] = {"png": _png_pixels, "webp": _webp_pixels}
